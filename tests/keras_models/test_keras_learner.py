"""A Keras learner in one process: its arrays, its steps, what it refuses; against torch, and mirrored against one."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import shoal
from keras_reference import BIAS, CLASSES, FEATURES, KERNEL, LIMITS, OBJECTIVE, OBJECTIVES, data, start
from shoal.data import ArrayDataset
from shoal.devices import Devices
from shoal.errors import ConfigurationError, DataError
from shoal.learners.keras_backend import keras
from shoal.types import Broadcast, LocalObjective, ModelState

LAYERS = keras.layers


def mirrored(count):
    return Devices("mirrored", count=count, accelerator="cpu")


def model(*layers, optimizer=None, policy=None, **options):
    """Returns a function that makes a compiled model; by itself a linear one."""

    def make():
        made = keras.Sequential(
            [keras.Input((FEATURES,)), *(layer() for layer in layers), LAYERS.Dense(CLASSES)], name=policy
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        rate = optimizer() if optimizer else keras.optimizers.SGD(0.1)
        made.compile(rate, loss, metrics=["accuracy"], **options)
        return made

    return make


def fitted(learner, examples=75, objective=None, seed=3):
    """Returns the model before one call to fit, and its update."""
    before = learner.init(0)
    broadcast = Broadcast(round=1, model=before, objective=objective or LocalObjective())
    return before, learner.fit(broadcast, data(examples), np.random.default_rng(seed))


def assert_equal(one, other, atol=0):
    assert one.keys() == other.keys()
    for name, array in other.items():
        np.testing.assert_allclose(one[name], array, atol=atol, rtol=0, err_msg=name)


def assert_same(one, other, atol=1e-6):
    for part in ("delta", "buffers"):
        assert_equal(dict(getattr(one, part)), dict(getattr(other, part)), atol=atol)
    assert one.weight == other.weight
    assert dict(one.metrics) == pytest.approx(dict(other.metrics), abs=1e-6)


class TestAgainstTorch:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("limits", LIMITS)
    @pytest.mark.parametrize("batch_size", [8, None])
    def test_it_takes_the_same_steps(self, reference, objective, limits, batch_size):
        expected = reference["fits"][f"{objective}, {limits}, {batch_size}"]
        ours = shoal.KerasLearner(model(), batch_size=batch_size, **LIMITS[limits])
        before = ModelState(params=start())
        broadcast = Broadcast(round=1, model=before, objective=OBJECTIVES[objective])
        update = ours.fit(broadcast, data(), np.random.default_rng(3))
        for name in (KERNEL, BIAS):
            np.testing.assert_allclose(update.delta[name], expected["delta"][name], atol=1e-6, rtol=0)
        assert dict(update.metrics) == pytest.approx(expected["metrics"], abs=1e-5)
        assert ours.evaluate(before, data()) == pytest.approx(expected["measured"], abs=1e-5)


OPTIMIZERS = {
    "sgd": None,
    "momentum": partial(keras.optimizers.SGD, 0.05, momentum=0.9, weight_decay=1e-2),
    "adam": partial(keras.optimizers.Adam, 0.01),
    "clipnorm": partial(keras.optimizers.Adam, 0.01, clipnorm=0.05),
    "global_clipnorm": partial(keras.optimizers.SGD, 0.1, global_clipnorm=0.05),
    "clipvalue": partial(keras.optimizers.SGD, 0.1, clipvalue=0.01),
}
NORMALIZED = model(lambda: LAYERS.Dense(8, activation="relu"), LAYERS.LayerNormalization)


class TestMirrored:
    @pytest.mark.parametrize(("count", "optimizer"), [*((2, name) for name in OPTIMIZERS), (3, "sgd"), (3, "clipnorm")])
    def test_it_is_one_device_with_the_whole_batch(self, count, optimizer):
        """25 steps at least, of which the last of an epoch has 3 examples; so with 3 devices one has fewer."""
        make = model(lambda: LAYERS.Dense(8, activation="tanh"), optimizer=OPTIMIZERS[optimizer])
        one = shoal.KerasLearner(make, batch_size=4 * count, epochs=5)
        several = dataclasses.replace(one, batch_size=4, devices=mirrored(count))
        (first, alone), (second, together) = fitted(one), fitted(several)
        assert_equal(dict(first.params), dict(second.params))
        assert_same(together, alone, atol=1e-5 if optimizer in ("adam", "clipnorm") else 1e-6)
        assert max(np.abs(array).max() for array in alone.delta.values()) > 1e-2
        ours, theirs = (learner.evaluate(first, data()) for learner in (several, one))
        assert ours == pytest.approx(theirs, abs=1e-6)

    @pytest.mark.parametrize("examples", [3, 4, 13, 14, 15])
    def test_a_device_without_an_example_counts_for_nothing(self, examples):
        one = shoal.KerasLearner(NORMALIZED, batch_size=12, epochs=2)
        several = dataclasses.replace(one, batch_size=4, devices=mirrored(3))
        (first, alone), (_, together) = fitted(one, examples), fitted(several, examples)
        assert_same(together, alone)
        held_out = data(examples - 2)
        assert several.evaluate(first, held_out) == pytest.approx(one.evaluate(first, held_out), abs=1e-6)

    def test_the_objective_is_counted_once(self):
        one = shoal.KerasLearner(model(), batch_size=8, epochs=2)
        several = dataclasses.replace(one, batch_size=4, devices=mirrored(2))
        assert_same(fitted(several, objective=OBJECTIVE)[1], fitted(one, objective=OBJECTIVE)[1])

    def test_fewer_examples_than_devices_are_refused(self):
        with pytest.raises(DataError, match="2 examples cannot be divided among 3 devices"):
            fitted(shoal.KerasLearner(model(), devices=mirrored(3)), examples=2)

    def test_more_logical_devices_than_tensorflow_started_with_are_refused(self):
        with pytest.raises(ConfigurationError, match="started with fewer logical CPU devices than the 9"):
            shoal.KerasLearner(model(), devices=mirrored(9)).init(0)


RICH = model(
    lambda: LAYERS.Dense(7, name="frozen", trainable=False), LAYERS.BatchNormalization, lambda: LAYERS.Dropout(0.5)
)


class TestArrays:
    def test_they_go_by_path_and_by_what_a_federation_does_with_them(self):
        state = shoal.KerasLearner(RICH).init(0)
        assert set(state.params) == {
            "sequential/batch_normalization/gamma",
            "sequential/batch_normalization/beta",
            "sequential/dense/kernel",
            "sequential/dense/bias",
        }
        assert set(state.buffers) == {f"sequential/batch_normalization/moving_{what}" for what in ("mean", "variance")}
        assert set(state.constants) == {"sequential/frozen/kernel", "sequential/frozen/bias"}

    def test_equal_seeds_give_equal_models_by_the_same_names(self):
        learner = shoal.KerasLearner(model())
        first, again, other = learner.init(1), shoal.KerasLearner(model()).init(1), learner.init(2)
        assert_equal(dict(first.params), dict(again.params))
        kernel = "sequential/dense/kernel"
        assert np.abs(first.params[kernel] - other.params[kernel]).max() > 0.1

    def test_statistics_are_sent_and_what_is_frozen_stays(self):
        learner = shoal.KerasLearner(RICH, batch_size=8)
        _, update = fitted(learner)
        assert all(np.abs(array).max() > 1e-3 for array in update.buffers.values())
        assert update.delta.keys() == learner.init(0).params.keys()

    def test_noise_is_a_function_of_the_seed(self):
        learner = shoal.KerasLearner(RICH, batch_size=8)
        (_, first), (_, again), (_, other) = fitted(learner), fitted(learner), fitted(learner, seed=4)
        assert_same(first, again, atol=0)
        kernel = "sequential/dense/kernel"
        assert np.abs(first.delta[kernel] - other.delta[kernel]).max() > 1e-3

    def test_another_models_arrays_are_refused(self):
        learner = shoal.KerasLearner(model())
        other = shoal.KerasLearner(RICH).init(0)
        with pytest.raises(ConfigurationError, match="not this model's: the tree"):
            learner.fit(Broadcast(round=1, model=other), data(), np.random.default_rng(0))


class TestSettings:
    def test_the_optimizer_begins_anew_or_goes_on(self):
        make = model(optimizer=OPTIMIZERS["momentum"])
        for keep in (False, True):
            learner = shoal.KerasLearner(make, batch_size=8, keep_optimizer=keep)
            broadcast = Broadcast(round=1, model=learner.init(0))
            first, second = (learner.fit(broadcast, data(), np.random.default_rng(3)) for _ in range(2))
            same = all(np.array_equal(first.delta[name], second.delta[name]) for name in first.delta)
            assert same is not keep

    @pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": True}], ids=["eager", "xla"])
    @pytest.mark.parametrize("count", [1, 2])
    def test_how_it_is_compiled_makes_no_difference(self, options, count):
        devices = Devices("mirrored", count=count, accelerator="cpu")
        plain, other = (
            shoal.KerasLearner(make, batch_size=32 // count, devices=devices) for make in (model(), model(**options))
        )
        assert_same(fitted(other)[1], fitted(plain)[1])
        start = plain.init(0)
        assert other.evaluate(start, data()) == pytest.approx(plain.evaluate(start, data()), abs=1e-6)

    def test_products_in_16_bits_leave_the_parameters_as_they_are(self):
        plain = shoal.KerasLearner(model(), batch_size=8)
        mixed = plain.on(Devices(accelerator="cpu", precision="bf16"))
        (before, ours), (_, theirs) = fitted(mixed), fitted(plain)
        assert {array.dtype for array in before.params.values()} == {np.dtype(np.float32)}
        gap = max(np.abs(ours.delta[name] - theirs.delta[name]).max() for name in theirs.delta)
        assert 0 < gap < 0.02
        assert keras.config.dtype_policy().name == "float32"

    def test_callbacks_are_called_as_by_keras_and_are_copied(self):
        class Noting(keras.callbacks.Callback):
            def __init__(self):
                super().__init__()
                self.calls = calls

            def __deepcopy__(self, memo):
                return Noting()

            def on_train_begin(self, logs=None):
                calls.append("train")

            def on_epoch_begin(self, epoch, logs=None):
                calls.append(("epoch", epoch))

            def on_train_batch_end(self, batch, logs=None):
                calls.append(batch)

            def on_epoch_end(self, epoch, logs=None):
                calls.append(sorted(logs))
                self.model.stop_training = epoch == 1

            def on_train_end(self, logs=None):
                calls.append("end")

        calls = []
        learner = shoal.KerasLearner(model(), batch_size=50, epochs=9, callbacks=[Noting()])
        an_epoch = [0, 1, ["accuracy", "loss"]]
        for _ in range(2):
            calls.clear()
            fitted(learner)
            assert calls == ["train", ("epoch", 0), *an_epoch, ("epoch", 1), *an_epoch, "end"]

    def test_what_decides_the_numbers_is_told(self):
        told = [shoal.KerasLearner(model(optimizer=kind)).describe() for kind in (None, OPTIMIZERS["adam"])]
        assert told[0] != told[1]
        json.dumps(told)
        assert told[0] == shoal.KerasLearner(model(), eval_batch_size=3).describe()


class Own(keras.Model):
    def train_step(self, batch):
        return {}


def frozen():
    made = model()()
    made.trainable = False
    made.compile("sgd", "mse")
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: 3, "must be a function that makes a keras.Model, and it made 3"),
        (lambda: keras.Sequential([keras.Input((2,)), LAYERS.Dense(1)]), "the model is not compiled"),
        (lambda: compiled(keras.Sequential([LAYERS.Dense(1)])), "the model has no variables yet"),
        (frozen, "all its layers are frozen"),
        (lambda: compiled(of_its_own()), "Own has a train_step or test_step of its own"),
        (lambda: compiled(twins()), "two variables of the model have the path"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        shoal.KerasLearner(make).init(0)


def compiled(made):
    made.compile("sgd", "mse")
    return made


def of_its_own():
    inputs = keras.Input((2,))
    return Own(inputs, LAYERS.Dense(1)(inputs))


def twins():
    """Two layers within two that have one name."""
    inputs = keras.Input((2,))
    inner = [keras.Sequential([keras.Input((2,)), LAYERS.Dense(2, name="a")], name="same") for _ in range(2)]
    middle = [keras.Sequential([keras.Input((2,)), one], name="outer") for one in inner]
    first = middle[0](inputs)

    class Holder(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = middle

        def call(self, batch):
            return self.second(self.first(batch))

    holder = Holder()
    holder(np.zeros((1, 2), np.float32))
    del first
    return holder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"steps": 3, "epochs": 2}, "both steps=3 and epochs=2 are set"),
        ({"devices": Devices("ddp", count=2)}, "strategy 'ddp' is torch's; a Keras model trains with 'single'"),
        ({"devices": Devices(accelerator="cuda")}, "sees none; use accelerator='cpu'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        shoal.KerasLearner(model(), **settings).init(0)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (np.zeros((3, 4), np.float32), [0, 1, 2], "the model and the loss do not take the data: ValueError"),
        (np.zeros((3, FEATURES), np.float32), [0, 5, 1], "sample 1 has a label outside 0 to 4, the model's 5 outputs"),
    ],
)
def test_data_that_do_not_fit_are_refused(inputs, targets, message):
    with pytest.raises(DataError, match=message):
        shoal.KerasLearner(model()).check(ArrayDataset(inputs, np.array(targets)))


def test_no_example_is_refused():
    learner = shoal.KerasLearner(model())
    with pytest.raises(DataError, match="no example to train on"):
        fitted(learner, examples=0)
    with pytest.raises(DataError, match="no example to evaluate on"):
        learner.evaluate(learner.init(0), data(0))


def test_it_is_public_and_says_what_it_is():
    assert shoal.KerasLearner.__doc__
    assert shoal.KerasLearner.__module__ == "shoal.learners.keras"
