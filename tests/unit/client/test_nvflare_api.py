from __future__ import annotations

import numpy as np
import pytest

import shoal.client.nvflare_api as flare
from shoal.errors import ConfigurationError
from shoal.sites.address import FOLDER, NAME


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has not called anything yet, outside of a federation."""
    for name in (FOLDER, NAME, "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("_tasks", "_received"):
        monkeypatch.setattr(flare, name, [])
    monkeypatch.setattr(flare, "_logged", {})


def test_a_script_that_runs_by_itself_has_one_round(capsys):
    flare.init(model={"w": np.ones(2)})
    turns = 0
    while flare.is_running():
        assert flare.is_running()
        model = flare.receive()
        assert flare.receive() is model
        assert model.params_type is flare.ParamsType.FULL
        assert (model.current_round, model.total_rounds, model.start_round) == (0, 1, 0)
        assert model.params["w"].tolist() == [1, 1]
        assert flare.is_train()
        assert not flare.is_evaluate()
        assert not flare.is_submit_model()
        assert flare.get_task_name() == "train"
        assert flare.log("learning_rate", 0.5)
        assert not flare.log("note", "text")
        sent = flare.FLModel(params={"w": np.zeros(2)}, metrics={"loss": 2.0}, meta={"NUM_STEPS_CURRENT_ROUND": 7})
        flare.send(sent)
        assert sent.params is None
        assert model.params is None
        turns += 1
    assert turns == 1
    assert flare.receive() is None
    assert flare.receive(timeout=0.1) is None
    assert "7 examples: learning_rate 0.5, loss 2" in capsys.readouterr().out


def test_who_it_is():
    assert flare.system_info() == {"job_id": "local", "site_name": "local"}
    assert flare.get_config() == {"job_id": "local", "site_name": "local"}


def test_what_is_not_cleared_can_be_used_again():
    flare.init(model={"w": np.ones(2)})
    model = flare.receive()
    flare.send(model, clear_cache=False)
    assert model.params["w"].tolist() == [1, 1]


def test_init_may_be_called_again(caplog):
    flare.init()
    flare.init()
    assert "called already" in caplog.text


@pytest.mark.parametrize("call", [flare.is_running, flare.receive, flare.get_task_name, flare.shutdown])
def test_init_comes_first(call):
    with pytest.raises(ConfigurationError, match=r"call flare.init\(\) first"):
        call()


def test_a_rank_that_is_not_the_launchers_is_refused():
    with pytest.raises(ConfigurationError, match="whose rank is 0"):
        flare.init(rank=1)


def test_a_script_by_itself_says_what_it_starts_from():
    flare.init()
    with pytest.raises(ConfigurationError, match=r"flare.init\(model=net\)"):
        flare.receive()


def test_there_must_be_something_to_answer():
    flare.init(model={"w": np.ones(2)})
    with pytest.raises(ConfigurationError, match=r"call flare.receive\(\) first"):
        flare.send(flare.FLModel(params={}))
    flare.receive()
    with pytest.raises(ConfigurationError, match="neither params nor metrics"):
        flare.send(flare.FLModel())


def test_after_a_shutdown_there_is_nothing():
    flare.init(model={"w": np.ones(2)})
    flare.shutdown()
    assert not flare.is_running()


def test_a_type_without_parameters_is_refused():
    with pytest.raises(ValueError):
        flare.FLModel(params_type="DIFF")
    with pytest.raises(ValueError):
        flare.FLModel(params_type="HALF", params={})


def test_the_fields_are_nvflares():
    theirs = pytest.importorskip("nvflare.app_common.abstract.fl_model")
    given = {"params": {"w": 1}, "metrics": {"a": 1.0}, "current_round": 2, "total_rounds": 3, "meta": {"x": 1}}
    expected, found = vars(theirs.FLModel(**given)), vars(flare.FLModel(**given))
    assert found == {name: value for name, value in expected.items() if not name.startswith("_")}
