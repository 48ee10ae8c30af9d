"""A Keras model trained at one site: as torch's with the same numbers, on one device and mirrored, and resumed."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import shoal
from keras_federation import make
from keras_reference import BIAS, CLASSES, FEATURES, KERNEL, data
from shoal.data import ArrayDataset
from shoal.devices import Devices
from shoal.errors import ConfigurationError, DataError, RunFolderError, RunInterrupted
from shoal.learners.keras_backend import keras

DATA, HELD_OUT = data(45), data(20, 1)


def noisy(rate=0.05):
    """Returns a model with an optimizer's state, statistics and noise."""
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(CLASSES),
        ]
    )
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(model=make, *, learner=None, **settings):
    settings = {"epochs": 3, "evaluate": HELD_OUT, "seed": 1, "tensorboard": False, **settings}
    return shoal.train(shoal.KerasLearner(model, batch_size=8, **(learner or {})), DATA, **settings)


def test_it_is_the_training_of_a_torch_learner(reference):
    ours, expected = train(), reference["training"]
    for name in (KERNEL, BIAS):
        np.testing.assert_allclose(ours.params[name], expected["params"][name], atol=1e-6, rtol=0)
    assert len(ours.history) == 3
    for mine, other in zip(ours.history, expected["history"], strict=True):
        assert {name: mine[name] for name in other} == pytest.approx(other, abs=1e-5)
    assert [vars(one) for one in ours.classes] == [pytest.approx(one) for one in expected["classes"]]


@pytest.mark.parametrize("count", [2, 3])
def test_mirrored_devices_are_one_with_the_whole_batch(count):
    several = train(learner={"devices": Devices("mirrored", count=count, accelerator="cpu")})
    one = shoal.train(
        shoal.KerasLearner(make, batch_size=8 * count), DATA, epochs=3, evaluate=HELD_OUT, seed=1, tensorboard=False
    )
    np.testing.assert_allclose(several.params[KERNEL], one.params[KERNEL], atol=1e-6)
    assert several.history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], abs=1e-6)


def test_a_rate_is_scaled_with_the_devices():
    mirrored = Devices("mirrored", count=2, accelerator="cpu")
    scaled = train(learner={"devices": mirrored}, scale_lr=True)
    by_hand = train(partial(scaled_by, 2), learner={"devices": mirrored})
    np.testing.assert_array_equal(scaled.params[KERNEL], by_hand.params[KERNEL])
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    with pytest.raises(ConfigurationError, match="compiled with a schedule: scale that one"):
        train(partial(noisy, schedule), scale_lr=True)


def scaled_by(factor):
    model = make()
    model.optimizer.learning_rate = 0.1 * factor
    return model


class Stopping(shoal.TrainingCallback):
    """Interrupts a training after a step."""

    def __init__(self, step):
        self.step = step

    def on_steps(self, progressed):
        if progressed.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [2, 6, 9])  # in the first epoch, at its end, and in the second
@pytest.mark.parametrize("count", [1, 2])
def test_a_resumed_training_is_one_that_was_not_interrupted(tmp_path, step, count):
    devices = Devices("mirrored", count=count, accelerator="cpu")
    settings = {"learner": {"devices": devices}, "log_every": 1, "checkpoint_every": 2}
    whole = train(noisy, run_dir=tmp_path / "whole", **settings)
    with pytest.raises(RunInterrupted, match=f"stopped after step {step}; the state is saved"):
        train(noisy, run_dir=tmp_path / "parts", callbacks=[Stopping(step)], **settings)
    resumed = train(noisy, run_dir=tmp_path / "parts", resume=True, **settings)
    for name, array in whole.params.items():
        np.testing.assert_array_equal(resumed.params[name], array, err_msg=name)
    assert told(tmp_path / "parts") == told(tmp_path / "whole")


def told(run):
    """Returns what a run's folder says of each epoch, but for times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in ("epoch", "loss", "accuracy", "train_loss")} for record in records]


def test_another_optimizer_is_another_training(tmp_path):
    train(partial(noisy, 0.05), run_dir=tmp_path / "run", epochs=1)
    with pytest.raises(RunFolderError, match="learning_rate"):
        train(partial(noisy, 0.06), run_dir=tmp_path / "run", epochs=1, resume=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"learner": {"callbacks": [keras.callbacks.TerminateOnNaN()]}}, ConfigurationError, "leave callbacks out"),
        (
            {"learner": {"devices": Devices("mirrored", count=50, accelerator="cpu")}},
            ConfigurationError,
            "started with fewer logical CPU devices than the 50",
        ),
        ({"trace": True, "run_dir": "run"}, ConfigurationError, "records with torch's profiler"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(settings, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        train(**settings)
    assert not list(tmp_path.iterdir())


def test_fewer_examples_than_devices_are_refused():
    few = ArrayDataset(DATA.inputs[:2], DATA.targets()[:2], classes=CLASSES)
    learner = shoal.KerasLearner(make, devices=Devices("mirrored", count=3, accelerator="cpu"))
    with pytest.raises(DataError, match="2 examples cannot be divided among 3 devices"):
        shoal.train(learner, few, epochs=1)
