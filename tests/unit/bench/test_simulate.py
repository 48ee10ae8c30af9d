from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import shoal
from shoal.bench import MODELS, simulate
from shoal.bench.baseline import PlainLoop, SpawnedClients
from shoal.bench.models import random_samples
from shoal.cli.main import app
from shoal.errors import ConfigurationError

SMALL = {"population": 20, "cohort": 4, "samples": 6, "batch_size": 3, "rounds": 2}


@pytest.mark.parametrize("model", ["logistic", "mlp", "lenet", "transformer"])
@pytest.mark.parametrize("engine", ["sequential", "vectorized", "process"])
def test_every_number_is_measured(model, engine):
    found = simulate(model=model, engine=engine, baseline="loop", devices=shoal.Devices(threads=1), **SMALL)
    assert found.engine == engine
    assert found.seconds_per_round > 0
    assert found.clients_per_second == pytest.approx(4 / found.seconds_per_round)
    assert found.samples_per_second == pytest.approx(24 / found.seconds_per_round)
    assert found.peak_host_bytes > 2**26
    assert found.baseline_ratio > 0


@pytest.mark.slow
def test_a_process_for_each_client_is_measured_too_and_takes_far_longer():
    found = simulate(model="logistic", engine="sequential", baseline="spawn", **SMALL | {"rounds": 1, "cohort": 2})
    assert found.baseline_ratio > 10


@pytest.mark.slow
def test_a_spawned_client_trains_as_the_plain_loop_does():
    """One batch for each client, so that nothing is drawn."""
    data, clients = random_samples(MODELS["logistic"], 8), np.arange(8).reshape(2, 4)
    spawned = SpawnedClients("logistic", "cpu", data, clients, batch_size=4)
    model = MODELS["logistic"].make()
    with torch.no_grad():
        for p, given in zip(model.parameters(), spawned._params, strict=True):
            p.copy_(torch.from_numpy(given))
    table = torch.from_numpy(clients)
    loop = PlainLoop(model, torch.from_numpy(data.inputs), torch.from_numpy(data.targets()), table, batch_size=4)
    loop.round(np.arange(2))
    spawned.round(np.arange(2))
    for p, ours in zip(model.parameters(), spawned._params, strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(ours))


def test_the_models_are_the_known_ones():
    sizes = {name: sum(p.numel() for p in model.make().parameters()) for name, model in MODELS.items()}
    assert sizes["logistic"] == 610
    assert sizes["mlp"] == 159_010
    assert sizes["lenet"] == 62_006
    assert 11e6 < sizes["resnet18gn"] < 11.3e6
    images = torch.randn(2, *MODELS["resnet18gn"].shape)
    assert MODELS["resnet18gn"].make()(images).shape == (2, 10)


def test_the_plain_loop_is_federated_averaging():
    """One step of one batch each, so that the mean of the clients is gradient descent on all of them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, targets = torch.randn(12, 4), torch.randint(3, (12,))
    PlainLoop(model, inputs, targets, torch.arange(12).reshape(3, 4), batch_size=4).round(np.arange(3))
    copies = {name: p.clone().requires_grad_() for name, p in start.items()}
    torch.nn.functional.cross_entropy(torch.func.functional_call(model, copies, (inputs,)), targets).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name] - 0.1 * copies[name].grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "lenett"}, "unknown model 'lenett'; did you mean 'lenet'"),
        ({"cohort": 0}, "cohort must be at least 1, not 0"),
        ({"batch_size": -1}, "batch-size must be at least 1, not -1"),
        ({"cohort": 21}, "a cohort of 21 clients was asked for, but the population has 20"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        simulate(**{"model": "logistic", **SMALL, **settings})


def test_the_command_prints_a_table_or_json():
    words = ["bench", "simulate", "--model", "logistic", "--population", "20", "--cohort", "4", "--rounds", "2"]
    words += ["--threads", "1"]
    shown = CliRunner().invoke(app, [*words, "--baseline", "loop"])
    assert shown.exit_code == 0, shown.output
    assert "vectorized" in shown.output
    assert "times as long" in shown.output
    printed = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    keys = {"engine", "model", "seconds_per_round", "clients_per_second", "peak_host_bytes", "peak_device_bytes"}
    assert keys | {"baseline_ratio"} <= printed.keys()
    assert printed["baseline_ratio"] is None
    assert CliRunner().invoke(app, [*words, "--engine", "sequential", "--block-size", "3"]).exit_code == 2
    process = [*words, "--engine", "process", "--max-concurrent", "1", "--clients-per-process", "2", "--json"]
    assert json.loads(CliRunner().invoke(app, process).stdout)["engine"] == "process"
    assert CliRunner().invoke(app, [*words, "--engine", "vectorized", "--max-concurrent", "1"]).exit_code == 2
    assert CliRunner().invoke(app, [*words, "--baseline", "loops"]).exit_code == 2
