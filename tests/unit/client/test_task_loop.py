from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import shoal.client
from shoal.errors import ConfigurationError, WorkerError
from shoal.sites.address import FOLDER, NAME, Address
from support import Mlp, assert_equal


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """Outside of any federation."""
    for name in (FOLDER, "RANK", "SHOAL_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_a_script_that_runs_by_itself_has_one_task():
    tasks = shoal.client.tasks()
    (task,) = tasks
    assert (task.kind, task.round, task.rounds, task.site, dict(task.config)) == ("train", 1, 1, "local", {})
    assert not task.objective.proximal
    assert list(tasks) == []


def test_it_starts_from_its_own_model():
    net = Mlp()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    (task,) = shoal.client.tasks(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert_equal(task.params, before)
    task.load(net)
    assert_equal(net.state_dict(), before)


def test_it_may_give_arrays():
    arrays = {"w": np.ones(3)}
    (task,) = shoal.client.tasks(arrays)
    arrays["w"][:] = 5
    np.testing.assert_array_equal(task.params["w"], np.ones(3))


def test_without_a_model_there_are_no_parameters():
    net = Mlp()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    (task,) = shoal.client.tasks()
    with pytest.raises(ConfigurationError, match="this script runs by itself, so no server has sent parameters"):
        _ = task.params
    task.load(net)
    assert_equal(net.state_dict(), before)
    loss = torch.ones(())
    assert task.apply(loss, net) is loss


def test_its_reply_is_told(capsys):
    for task in shoal.client.tasks():
        task.reply(params={}, examples=12, metrics={"loss": 0.25, "accuracy": 1})
    assert capsys.readouterr().out == "shoal: the task to train in round 1 alone, 12 examples: loss 0.25, accuracy 1\n"


def test_only_rank_0_tells(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for task in shoal.client.tasks():
        task.reply(params={}, examples=1)
    assert capsys.readouterr().out == ""


def test_settings_may_be_given_by_hand(monkeypatch):
    monkeypatch.setenv("SHOAL_CONFIG", '{"lr": 0.1}')
    (task,) = shoal.client.tasks()
    assert task.config == shoal.client.config() == {"lr": 0.1}


@pytest.mark.parametrize("said", ["lr=0.1", "[1]"])
def test_settings_that_are_no_object_are_refused(monkeypatch, said):
    monkeypatch.setenv("SHOAL_CONFIG", said)
    with pytest.raises(ConfigurationError, match="must be a JSON object such as"):
        list(shoal.client.tasks())


def test_a_federation_that_is_over_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path / "gone"))
    with pytest.raises(ConfigurationError, match="the federation that started this script is over"):
        shoal.client.tasks()


def test_a_server_that_is_gone_is_told(monkeypatch):
    address = Address.create()
    try:
        monkeypatch.setenv(FOLDER, str(address.folder))
        monkeypatch.setenv(NAME, "site-1")
        with pytest.raises(WorkerError, match="the federation's server cannot be reached"):
            shoal.client.tasks()
    finally:
        address.remove()


def test_a_script_with_arrays_needs_no_torch():
    code = "import sys, shoal.client\nfor task in shoal.client.tasks(): task.reply(params={}, examples=1)\n"
    code += "assert 'torch' not in sys.modules, sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=dict(os.environ))
