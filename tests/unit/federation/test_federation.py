from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
import traceback
import typing

import numpy as np
import pytest
import torch

import shoal
from shoal.data import ArrayDataset, Population
from shoal.engines import ClientResult, SequentialEngine
from shoal.errors import ClientError, ConfigurationError, DataError, MissingExtraError, NonFiniteError
from shoal.federation.experiment import Settings
from support import Failing, Mlp, assert_equal, learner, population, samples


class Sends(SequentialEngine):
    """An engine whose clients send what a test says."""

    name = "sends"

    def __init__(self, change):
        self.change = change

    def run(self, learner, broadcast, tasks):
        for task in tasks:
            update = learner.fit(broadcast, task.data, task.rng())
            yield ClientResult(client=task.client, update=self.change(task.client, update))


def federate(**settings):
    settings = {"learner": learner(), "clients": population(), "rounds": 3, "cohort": 3, **settings}
    return shoal.federate(settings.pop("learner"), settings.pop("clients"), **settings)


def poisoned(value):
    def change(client, update):
        if client != 2:
            return update
        return dataclasses.replace(update, delta={k: torch.full_like(v, value) for k, v in update.delta.items()})

    return change


def without_a_tensor(client, update):
    return dataclasses.replace(update, delta=dict(list(update.delta.items())[1:]))


def with_another_shape(client, update):
    return dataclasses.replace(update, delta={name: d.reshape(1, -1) for name, d in update.delta.items()})


def with_a_stranger(client, update):
    return dataclasses.replace(update, buffers={"stranger": torch.ones(1)})


def weightless(client, update):
    return dataclasses.replace(update, weight=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poisoned(float("nan")), "client 2 failed in round 1: .*delta holds NaN or infinity"),
        (poisoned(float("inf")), "client 2 failed in round 1: .*delta holds NaN or infinity"),
        (without_a_tensor, "client 0 failed in round 1: .*delta lacks 0.weight"),
        (with_another_shape, r"delta 0.weight has shape \(1, 48\) where \(8, 6\) is expected"),
        (with_a_stranger, "buffers has unknown stranger"),
        (weightless, "weight is 0.0"),
    ],
)
def test_an_update_that_cannot_be_used_stops_the_run(change, message):
    with pytest.raises(ClientError, match=message):
        federate(engine=Sends(change), cohort=None)


def test_failed_clients_are_left_out_with_a_warning_up_to_the_limit(caplog):
    with caplog.at_level(logging.WARNING, logger="shoal"):
        result = federate(engine=Sends(poisoned(float("nan"))), cohort=None, max_failures=1)
    assert [record["failed"] for record in result.history] == [[2]] * 3
    assert [record["clients"] for record in result.history] == [4] * 3
    assert all(torch.isfinite(p).all() for p in result.params.values())
    assert len(caplog.records) == 3
    assert "client 2 failed in round 1" in caplog.records[0].message
    without = Population.from_datasets([population()[k] for k in (0, 1, 3, 4)])
    assert result.history[0]["examples"] == without.sizes.sum()


def test_all_failed_is_too_many_whatever_the_limit():
    with pytest.raises(ClientError, match="all 5 clients of round 1 failed"):
        federate(engine=Sends(weightless), cohort=None, max_failures=99)


def test_the_clients_own_traceback_is_the_cause():
    def act(inputs):
        raise ZeroDivisionError("in the user's own forward")

    with pytest.raises(ClientError, match="ZeroDivisionError: in the user's own forward") as caught:
        federate(learner=learner(lambda: Failing(act)))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    names = [entry.name for entry in traceback.extract_tb(caught.value.__cause__.__traceback__)]
    assert names[-1] == "act"


def test_nothing_non_finite_reaches_the_global_model():
    with pytest.raises(NonFiniteError, match=r"round 1 .* was not taken"):
        federate(algorithm=shoal.FedAvg(server_lr=1e300))


@pytest.mark.parametrize("memory", [None, "folder"])
def test_a_diverging_run_keeps_the_last_good_model(memory, tmp_path):
    run_dir = tmp_path / "run" if memory else None
    calls = []

    def change(client, update):
        calls.append(client)
        return update if len(calls) <= 3 else poisoned(float("nan"))(2, update)

    with pytest.raises(ClientError, match="round 2"):
        federate(engine=Sends(change), run_dir=run_dir, checkpoint_every=100, tensorboard=False)
    if run_dir:
        same = {"engine": "sequential", "checkpoint_every": 100, "tensorboard": False}
        resumed = federate(run_dir=run_dir, resume=True, **same)
        assert_equal(resumed.params, federate(**same).params)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"cohort": 6}, ConfigurationError, "a cohort of 6 clients was asked for, but the population has 5"),
        ({"clients": Population.from_datasets([])}, DataError, "there are no clients"),
        ({"cohort": 0}, ConfigurationError, "cohort must be a whole number ≥ 1, not 0"),
        ({"rounds": 0}, ConfigurationError, "rounds must be a whole number ≥ 1, not 0"),
        ({"max_failures": -1}, ConfigurationError, "max_failures must be"),
        ({"client_validation": 1.0}, ConfigurationError, r"client_validation must be a share in \[0, 1\)"),
        ({"max_seconds": 0.0}, ConfigurationError, "max_seconds must be > 0"),
        ({"seed": -1}, ConfigurationError, "the seed must be a whole number ≥ 0"),
        ({"engine": "sequental"}, ConfigurationError, "unknown engine 'sequental'; did you mean 'sequential'"),
        ({"target": 0.9}, ConfigurationError, "nothing is measured"),
        (
            {"evaluate": samples(9), "metric": "acuracy"},
            ConfigurationError,
            "unknown metric 'acuracy'; did you mean 'acc",
        ),
        ({"learner": 3}, ConfigurationError, "learner must be a learner"),
        ({"algorithm": shoal.FedAvg}, ConfigurationError, "algorithm must be one such as"),
        ({"learner": learner(devices=shoal.Devices("ddp"))}, ConfigurationError, "asks for strategy 'ddp'"),
        ({"clients": samples(9)}, ConfigurationError, "clients must be a Population or a sequence"),
        ({"evaluate": 3}, ConfigurationError, "int is no data set"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        federate(**settings, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def with_inputs(change):
    data = samples(20)
    inputs, targets = data.inputs.copy(), data.targets().copy()
    change(inputs, targets)
    return ArrayDataset(inputs, targets, classes=3, name="mine")


def put(place, value, *, label=False):
    def change(inputs, targets):
        (targets if label else inputs)[place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put((7, 2), np.nan), "mine: sample 7 has an input that is NaN or infinite"),
        (put((11, 0), -np.inf), "mine: sample 11 has an input that is NaN or infinite"),
        (put(13, 3, label=True), "mine: sample 13 has a label outside 0 to 2"),
        (put(13, -1, label=True), "mine: sample 13 has a label outside 0 to 2"),
    ],
)
@pytest.mark.parametrize("where", ["training", "held out"])
def test_bad_data_are_found_before_anything_is_written(change, message, where, tmp_path):
    data = with_inputs(change)
    clients = Population(data, np.arange(20), np.array([0, 10, 20])) if where == "training" else population()
    with pytest.raises(DataError, match=message):
        federate(clients=clients, cohort=2, evaluate=data, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_empty_client_is_named():
    clients = Population(samples(10), np.arange(10), np.array([0, 4, 4, 10]))
    with pytest.raises(DataError, match="client 1 has no samples"):
        federate(clients=clients)


def test_the_best_model_is_that_of_the_metric_and_the_last_round_counts():
    held_out = samples(200, seed=9)
    result = federate(rounds=7, evaluate=held_out, evaluate_every=3)
    measured = {record["round"]: record["accuracy"] for record in result.history if "accuracy" in record}
    assert set(measured) == {3, 6, 7}
    assert result.best.value == max(measured.values()) == measured[result.best.round]
    ours = learner()
    module = Mlp()
    module.load_state_dict(dict(result.params))
    model = dataclasses.replace(ours.init(0), params=dict(module.named_parameters()))
    assert ours.evaluate(model, held_out)["accuracy"] == pytest.approx(result.best.value)


def test_losses_count_down_and_without_a_measure_the_last_model_is_delivered():
    result = federate(rounds=4, evaluate=samples(50, seed=9), metric="loss")
    assert result.best.value == min(record["loss"] for record in result.history)
    plain = federate(rounds=4)
    assert plain.best is None
    assert_equal(plain.params, plain.last_params)


def test_validation_examples_are_not_trained_on_and_are_the_same_in_every_round():
    result = federate(rounds=2, cohort=None, client_validation=0.25)
    sizes = population().sizes
    held_out = sum(max(round(size * 0.25), 1) for size in sizes)
    assert result.history[0]["examples"] == sizes.sum() - held_out
    assert {"client_loss", "client_accuracy", "client_accuracy_p10", "client_accuracy_p90"} <= set(result.history[0])
    assert result.best.metric == "client_accuracy"


class Collects(shoal.Callback):
    def __init__(self, stop_after=None):
        self.seen = []
        self.stop_after = stop_after

    def on_run_start(self, run):
        self.seen.append(("start", run.first_round, run.cohort))

    def on_client_end(self, round, client, error):
        self.seen.append(("client", round, client))

    def on_round_end(self, record):
        self.seen.append(("round", record["round"]))
        return "the callback says so" if record["round"] == self.stop_after else None

    def on_run_end(self, result):
        self.seen.append(("end", result.stopped))

    def close(self):
        self.seen.append(("close",))


def test_callbacks_see_everything_in_order_and_may_stop():
    watcher = Collects(stop_after=2)
    result = federate(rounds=9, cohort=2, evaluate=samples(9), evaluate_every=5, callbacks=[watcher])
    assert result.stopped == "the callback says so"
    kinds = [event[0] for event in watcher.seen]
    assert kinds == ["start", *(["client", "client", "round"] * 2), "end", "close"]
    assert [record["round"] for record in result.history] == [1, 2]
    assert "accuracy" in result.history[-1]  # the last round is measured, however the run came to its end


def test_callbacks_are_closed_after_an_error_too():
    watcher = Collects()
    with pytest.raises(ClientError):
        federate(engine=Sends(weightless), callbacks=[watcher])
    assert watcher.seen[-1] == ("close",)


def test_criteria_to_stop():
    held_out = samples(100, seed=9)
    reached = federate(rounds=50, evaluate=held_out, target=0.6)
    assert "accuracy has reached 0.6" in reached.stopped
    assert reached.history[-1]["accuracy"] >= 0.6 > max([0.0, *(r["accuracy"] for r in reached.history[:-1])])
    stalled = federate(rounds=50, learner=learner(lr=1e-12), evaluate=held_out, patience=3)
    assert stalled.stopped == "accuracy has not improved for 3 rounds"
    assert len(stalled.history) == 4
    hurried = federate(rounds=10**6, max_seconds=0.2, evaluate=held_out, evaluate_every=10**5)
    assert hurried.stopped == "0.2 seconds have passed"
    assert [("accuracy" in record) for record in hurried.history] == [False] * (len(hurried.history) - 1) + [True]


def test_a_record_says_what_the_round_did():
    record = federate(rounds=1, cohort=None).history[0]
    model_bytes = 4 * sum(p.numel() for p in Mlp().parameters())
    assert record["round"] == 1
    assert record["clients"] == 5
    assert record["failed"] == []
    assert record["examples"] == 53
    assert record["bytes_down"] == record["bytes_up"] == 5 * model_bytes
    assert record["train_loss_p10"] <= record["train_loss_p50"] <= record["train_loss_p90"]
    assert record["clients_per_second"] == pytest.approx(5 / record["seconds"])


def test_the_signature_of_federate_holds_every_setting_of_an_experiment():
    named = set(inspect.signature(shoal.federate).parameters) - {"settings", "run_dir", "resume", "callbacks"}
    fields = {field.name: field for field in dataclasses.fields(shoal.Experiment)}
    assert named | set(Settings.__annotations__) == set(fields)
    hints = typing.get_type_hints(shoal.Experiment)
    assert {name: hints[name] for name in Settings.__annotations__} == typing.get_type_hints(Settings)
    defaults = {name: p.default for name, p in inspect.signature(shoal.federate).parameters.items() if name in fields}
    for name in ("cohort", "engine", "seed", "name", "evaluate"):
        assert defaults[name] == fields[name].default


def test_without_extras_a_run_goes_on_with_a_notice_unless_they_were_asked_for(tmp_path, monkeypatch):
    for package in ("tensorboardX", "plotly"):
        monkeypatch.setitem(sys.modules, package, None)
    result = federate(run_dir=tmp_path / "run")
    assert [notice.partition(":")[0] for notice in result.notices] == ["no TensorBoard events", "no report"]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"model.safetensors", "metrics.jsonl"}
    with pytest.raises(MissingExtraError, match=r"pip install 'shoal\[tracking\]'"):
        federate(run_dir=tmp_path / "other", tensorboard=True)
    assert not (tmp_path / "other").exists()


def test_a_report_without_a_folder_is_refused():
    with pytest.raises(ConfigurationError, match="pass run_dir"):
        federate(rounds=1).report()
