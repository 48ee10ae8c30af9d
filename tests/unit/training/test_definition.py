from __future__ import annotations

import numpy as np
import pytest

import shoal
from shoal.data import ArrayDataset
from shoal.errors import ConfigurationError, DataError
from support import FEATURES, learner, samples


class FederatedOnly:
    """A learner that cannot train step by step."""

    devices = shoal.Devices()

    def preload(self): ...
    def init(self, seed): ...
    def fit(self, broadcast, data, rng): ...
    def evaluate(self, model, data): ...
    def check(self, data): ...
    def state_dict(self, model): ...
    def on(self, devices): ...
    def describe(self): ...


def train(**settings):
    settings = {"learner": learner(), "data": samples(20), "evaluate": samples(10, seed=5), "epochs": 1, **settings}
    return shoal.train(settings.pop("learner"), settings.pop("data"), **settings)


WHOLE = ("epochs", "evaluate_every", "patience", "log_every", "checkpoint_every", "keep_checkpoints")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_what_counts_must_be_a_whole_number(name, value, tmp_path):
    with pytest.raises(ConfigurationError, match=f"{name} must be a whole number ≥ 1, not {value!r}"):
        train(**{name: value}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seconds": 0}, "max_seconds must be > 0, not 0"),
        ({"max_seconds": float("nan")}, "max_seconds must be > 0, not nan"),
        ({"target": float("inf")}, "target must be a number, not inf"),
        ({"seed": -1}, "seed must be a whole number ≥ 0, not -1"),
        ({"learner": shoal.TorchLearner}, "learner must be a learner such as shoal.TorchLearner"),
        ({"learner": object()}, "learner must be a learner such as shoal.TorchLearner"),
        ({"learner": FederatedOnly()}, "FederatedOnly trains in federations only: use a shoal.TorchLearner"),
        ({"evaluate": None, "patience": 2}, "patience was given, but nothing is measured: pass evaluate=…"),
        ({"evaluate": None, "target": 0.9}, "target was given, but nothing is measured"),
        ({"evaluate": None, "metric": "loss"}, "metric was given, but nothing is measured"),
        ({"metric": "acuracy"}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({"data": 7}, "int is no data set"),
        ({"devices": shoal.Devices("ddp", count=2, accelerator="cpu")}, "'ddp' on 2 devices needs as many processes"),
        ({"devices": shoal.Devices(accelerator="cpu", precision="fp16")}, "fp16 is for CUDA devices"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message) as caught:
        train(**settings, run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def wrong_label():
    held_out = samples(10)
    return ArrayDataset(held_out.inputs, np.full(10, 7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ArrayDataset(np.zeros((0, FEATURES), np.float32), np.zeros(0, int))}, "there is no sample"),
        ({"evaluate": ArrayDataset(np.zeros((0, FEATURES), np.float32), np.zeros(0, int))}, "there is no sample"),
        ({"data": (np.zeros((4, 5), np.float32), np.zeros(4, int))}, "the model and the loss do not take the data"),
        ({"evaluate": (np.zeros((4, 5), np.float32), np.zeros(4, int))}, "the model and the loss do not take the data"),
        ({"data": wrong_label()}, "sample 0 has a label outside 0 to 2"),
        ({"evaluate": wrong_label()}, "sample 0 has a label outside 0 to 2"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(DataError, match=message):
        train(**settings, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_setting_of_a_training_is_told_and_kept():
    plan = shoal.Training(
        learner=learner(), data=samples(20), evaluate=samples(10), epochs=3, patience=2, metric="loss", seed=4
    )
    assert plan.options()["patience"] == 2
    identity = plan.identity(samples(20), None, effective_batch=8, lr_factor=2.0)
    assert (identity["seed"], identity["epochs"], identity["metric"]) == (4, 3, "loss")
    assert (identity["effective_batch"], identity["lr_factor"]) == (8, 2.0)
    assert not {"batch_size", "accumulate", "epochs", "steps"} & set(identity["learner"])
