from __future__ import annotations

import pytest

from shoal.client import imperative, init, is_running, receive, send
from shoal.errors import ConfigurationError
from shoal.sites.address import FOLDER


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has not called anything yet, outside of a federation."""
    monkeypatch.delenv(FOLDER, raising=False)
    for name in ("_source", "_next", "_current"):
        monkeypatch.setattr(imperative, name, [])


def test_a_script_that_runs_by_itself_has_one_task(capsys):
    init({"w": 1.5})
    rounds = []
    while is_running():
        assert is_running()  # asking again takes no task
        task = receive()
        rounds.append(task.round)
        assert task.params["w"] == 1.5
        send(params=task.params, examples=2)
    assert rounds == [1]
    assert not is_running()
    assert "2 examples" in capsys.readouterr().out


def test_receive_may_be_called_without_asking():
    init()
    assert receive().round == 1
    with pytest.raises(ConfigurationError, match="the federation is over: ask shoal.client.is_running"):
        receive()


@pytest.mark.parametrize("call", [is_running, receive])
def test_init_comes_first(call):
    with pytest.raises(ConfigurationError, match="call shoal.client.init.. first"):
        call()


def test_init_comes_once():
    init()
    with pytest.raises(ConfigurationError, match=r"shoal.client.init\(\) was called already"):
        init()


def test_there_must_be_a_task_to_answer():
    init()
    with pytest.raises(ConfigurationError, match="there is no task to answer: call shoal.client.receive"):
        send(params={}, examples=1)
    receive()
    send(params={}, examples=1)
    with pytest.raises(ConfigurationError, match="was replied to already"):
        send(params={}, examples=1)
