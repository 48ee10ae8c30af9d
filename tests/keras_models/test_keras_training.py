"""A Keras model trained at one site: as torch's with the same numbers, on one device and mirrored, and resumed."""

from __future__ import annotations

import json
from functools import partial
from typing import ClassVar

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


class Noting(keras.callbacks.Callback):
    """Writes down what it is called for, all copies of it in one list."""

    seen: ClassVar[list] = []

    def on_train_begin(self, logs=None):
        self.seen.append("begin")

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(f"epoch {epoch}")

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(f"batch {batch} {'loss' in logs}")

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append((epoch, dict(logs)))

    def on_train_end(self, logs=None):
        self.seen.append("end")


def test_a_training_calls_the_learners_callbacks():
    Noting.seen.clear()
    result = train(noisy, learner={"callbacks": [Noting()]}, epochs=2)
    batches = [f"batch {batch} True" for batch in range(6)]
    names = ("loss", "accuracy")
    ends = [
        (epoch, {f"val_{name}": record[name] for name in names} | {name: record[f"train_{name}"] for name in names})
        for epoch, record in enumerate(result.history)
    ]
    expected = ["begin", "epoch 0", *batches, ends[0], "epoch 1", *batches, ends[1], "end"]
    assert Noting.seen == expected


class Plateau(keras.callbacks.ReduceLROnPlateau):
    """Reduces the rate unless the loss falls by more than it ever does."""

    def __init__(self):
        super().__init__(monitor="val_loss", factor=0.5, patience=2, min_delta=9.0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize("more", [[], [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 1.0)]])
def test_callbacks_go_on_where_they_were(tmp_path, more):
    """Their counts, and the learning rates that they have set, in the middle of an epoch."""
    settings = {"learner": {"callbacks": [*more, Plateau()]}, "epochs": 7, "log_every": 1, "checkpoint_every": 2}
    whole = train(noisy, **settings)
    with pytest.raises(RunInterrupted):
        train(noisy, run_dir=tmp_path / "run", callbacks=[Stopping(20)], **settings)
    resumed = train(noisy, run_dir=tmp_path / "run", resume=True, **settings)
    rates = [record["learning_rate"] for record in whole.history]
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125])
    assert [record["learning_rate"] for record in resumed.history] == rates
    for name, array in whole.params.items():
        np.testing.assert_array_equal(resumed.params[name], array, err_msg=name)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
def test_a_rate_that_each_epoch_begins_with_is_set_once(tmp_path):
    halving = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    settings = {"learner": {"callbacks": [halving]}, "epochs": 4, "log_every": 1, "checkpoint_every": 2}
    whole = train(noisy, **settings)
    with pytest.raises(RunInterrupted):
        train(noisy, run_dir=tmp_path / "run", callbacks=[Stopping(8)], **settings)
    resumed = train(noisy, run_dir=tmp_path / "run", resume=True, **settings)
    rates = [record["learning_rate"] for record in whole.history]
    assert rates == pytest.approx([0.025, 0.0125, 0.00625, 0.003125])
    assert [record["learning_rate"] for record in resumed.history] == rates


def test_the_best_model_is_delivered_whatever_a_callback_does_to_the_last():
    first = keras.callbacks.LambdaCallback(on_train_end=lambda logs: None)
    spoiling = Spoiling()
    result = train(noisy, learner={"callbacks": [first, spoiling]}, epochs=3)
    plain = train(noisy, epochs=3)
    for name, array in plain.params.items():
        np.testing.assert_array_equal(result.params[name], array, err_msg=name)
        np.testing.assert_array_equal(result.last_params[name], plain.last_params[name], err_msg=name)


class Spoiling(keras.callbacks.Callback):
    """Sets the model to zero at the end."""

    def on_train_end(self, logs=None):
        self.model.set_weights([0 * array for array in self.model.get_weights()])


def test_other_settings_of_a_callback_are_another_training(tmp_path):
    def settings(patience):
        stopping = keras.callbacks.EarlyStopping(monitor="val_loss", min_delta=9.0, patience=patience)
        return {"learner": {"callbacks": [stopping]}, "run_dir": tmp_path / "run"}

    train(noisy, **settings(2))
    with pytest.raises(RunFolderError, match="callbacks"):
        train(noisy, **settings(20), resume=True)


def test_a_refused_folder_leaves_a_callbacks_file_alone(tmp_path):
    log = tmp_path / "log.csv"
    settings = {"learner": {"callbacks": [keras.callbacks.CSVLogger(log)]}, "run_dir": tmp_path / "run"}
    train(noisy, **settings)
    before = log.read_bytes()
    with pytest.raises(RunFolderError, match="holds this run already"):
        train(noisy, **settings)
    assert log.read_bytes() == before
    assert before.count(b"\n") == 4


def test_a_callback_that_resumes_by_itself_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="BackupAndRestore would put a model of its own"):
        shoal.KerasLearner(make, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])


def test_a_callback_stops_a_training_for_good(tmp_path):
    stopping = keras.callbacks.EarlyStopping(monitor="val_loss", min_delta=9.0, patience=2)
    settings = {"learner": {"callbacks": [stopping]}, "epochs": 9, "run_dir": tmp_path / "run"}
    result = train(noisy, **settings)
    assert result.stopped == "a callback of the learner has stopped it"
    assert len(result.history) == 3
    again = train(noisy, **settings, resume=True)
    assert len(again.history) == 3
    assert again.stopped == result.stopped


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
