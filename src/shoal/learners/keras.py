"""The Keras learner: the user's compiled model under any algorithm, on one device or mirrored on several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from shoal.data import Dataset
from shoal.description import dataclass_fields, describe
from shoal.devices import Devices
from shoal.errors import ConfigurationError, DataError
from shoal.learners.batches import batch_sizes, check_divisible, draw_order, draw_seed, part_of_rank
from shoal.learners.keras_backend import keras, tf
from shoal.learners.keras_callbacks import Calls, kept
from shoal.learners.keras_devices import check_strategy, started, strategy_of
from shoal.learners.keras_model import ResidentModel
from shoal.learners.keras_steps import Part, Steps
from shoal.learners.keras_training import KerasTraining
from shoal.learners.labels import check_labels
from shoal.types import Broadcast, ModelState, Params, Update


@dataclass(frozen=True, eq=False)
class KerasLearner:
    """Trains and evaluates a compiled Keras model, on TensorFlow.

    Example::

        def make():
            model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
            return model

        KerasLearner(make, batch_size=32)

    The optimizer, the loss, the metrics, ``jit_compile`` and ``run_eagerly`` are those that the model was compiled
    with; ``steps_per_execution`` makes no difference. The arrays of the model go by the paths of its variables. A
    learner computes in the process that first uses it, with the TensorFlow that this process has.

    With ``Devices("mirrored", count=2)`` a global batch has twice ``batch_size`` examples, of which each replica has
    its part; a step is that of one device with the same global batch, also where that does not divide. What is no mean
    over examples, such as BatchNorm's statistics, is the mean over the replicas.

    Raises:
        ConfigurationError: A value is out of its range, or the model cannot be trained.
    """

    forks_first: ClassVar[bool] = True
    """Processes are forked before it computes in this one, because TensorFlow's threads do not come along."""
    model: Callable[[], Any]
    """Makes and compiles the model. It is called with Python's generator seeded, from which Keras draws its seeds."""
    _: KW_ONLY
    batch_size: int | None = 32
    """Examples in a batch on each device; None for all of a client's at once."""
    epochs: int = 1
    """Passes over the client's data in one call to :meth:`fit`."""
    steps: int | None = None
    """Number of batches in one call to :meth:`fit`, in place of ``epochs``."""
    callbacks: Sequence[Any] = ()
    """Keras callbacks, copied for each call to :meth:`fit`, in which epochs are counted from 0, and for a training. Of
    several processes all call them, but one alone those of Keras's that write."""
    keep_optimizer: bool = False
    """Whether the optimizer's state goes on from the last call to :meth:`fit`, whoever's data that had: for one site.
    Otherwise it begins anew."""
    eval_batch_size: int = 512
    """Examples in a batch of :meth:`evaluate`; it changes speed and memory, not the means."""
    devices: Devices = field(default_factory=Devices)
    """Where the model lives."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "steps", "eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {value}")
        if self.steps is not None and self.epochs != 1:
            raise ConfigurationError(f"both steps={self.steps} and epochs={self.epochs} are set; leave one out")
        check_strategy(self.devices)
        if any(isinstance(each, keras.callbacks.BackupAndRestore) for each in self.callbacks):
            raise ConfigurationError(
                "BackupAndRestore would put a model of its own in place of the federation's or the run folder's, which "
                "resume by themselves: leave it out, and use run_dir=… and resume=True"
            )

    def preload(self) -> None:
        """Makes sure that processes can be forked from this one; what training needs was imported with this module.

        Raises:
            ConfigurationError: TensorFlow is in use in this process, whose threads a forked one would not have.
        """
        if started():
            raise ConfigurationError(
                "TensorFlow is in use in this process, and a process forked from it would wait for its threads for "
                "ever: open the engine before anything computes with TensorFlow, or use engine='sequential'"
            )

    def init(self, seed: int) -> ModelState:
        """Returns the model before training, as numpy's arrays; equal seeds give equal models."""
        self.__dict__["resident"] = self._make(seed)  # the slot of the cached property
        self.__dict__.pop("stepper", None)
        return self.resident.state()

    def fit(self, broadcast: Broadcast, data: Dataset, rng: np.random.Generator) -> Update:
        """Trains the broadcast's model on ``data`` and returns what changed.

        The metrics of the update are the loss and the compiled metrics over all examples seen while training.

        Args:
            broadcast: The model to start from and the local objective.
            data: The client's examples, at least one for each device.
            rng: Seeds dropout and the like, and then draws the order of the batches.

        Raises:
            DataError: There are fewer examples than devices.
        """
        if len(data) == 0:
            raise DataError("there is no example to train on")
        resident = self.resident
        check_divisible(len(data), self._replicas)
        resident.load(broadcast.model)
        resident.reseed(draw_seed(rng))
        if not self.keep_optimizer:
            resident.reset_optimizer()
        self.stepper.begin(broadcast)
        means = self._train(data, rng)
        delta, buffers = resident.delta(broadcast.model)
        return Update(delta=delta, buffers=buffers, weight=float(len(data)), metrics=means)

    def evaluate(self, model: ModelState, data: Dataset) -> dict[str, float]:
        """Returns the loss and the compiled metrics, as means over ``data``."""
        self.resident.load(model)
        return self.measure(data)

    def measure(self, data: Dataset) -> dict[str, float]:
        """Returns the loss and the compiled metrics of a model that is in place, as means over ``data``.

        Raises:
            DataError: There is no example.
        """
        if len(data) == 0:
            raise DataError("there is no example to evaluate on")
        self.stepper.begin()
        sizes = batch_sizes(len(data), batch_size=self.eval_batch_size * self._replicas, epochs=1, steps=None)
        for parts, counts in self.batches(data, np.arange(len(data)), sizes, self.eval_batch_size):
            self.stepper.evaluate(parts, counts)
        return self.stepper.means()

    @property
    def classifies(self) -> bool:
        """Whether the targets are class indices, and the model's outputs scores of the classes."""
        return _takes_classes(self.resident.model.loss)

    @contextmanager
    def training(self, data: Dataset, *, epochs: int, seed: int, scale_lr: bool = False) -> Iterator[KerasTraining]:
        """Begins a training on the learner's devices, all of this process.

        Args:
            data: All examples.
            epochs: Passes over them.
            seed: Decides all randomness.
            scale_lr: Whether the learning rate is multiplied by the number of devices.

        Raises:
            ConfigurationError: The devices cannot be used.
            DataError: There are fewer examples than devices.
        """
        with closing(KerasTraining(self, data, epochs=epochs, seed=seed, scale_lr=scale_lr)) as training:
            yield training

    def check(self, data: Dataset) -> None:
        """Tries two examples and the labels' range, so that a misfit shows before anything is written.

        Raises:
            DataError: The model or the loss does not take the data, or a label has no output.
        """
        inputs, targets = data.take(np.arange(min(2, len(data))))
        model = self.resident.model
        labels = data.known_targets()
        try:
            outputs = model(tf.convert_to_tensor(inputs), training=False)
            if labels is not None and self.classifies:
                check_labels(labels, outputs=int(outputs.shape[-1]))
            loss = model.compute_loss(x=inputs, y=tf.convert_to_tensor(targets), y_pred=outputs, training=False)
        except DataError:
            raise
        except (ValueError, TypeError, tf.errors.OpError) as error:
            first = str(error).strip().splitlines()[0]
            raise DataError(f"the model and the loss do not take the data: {type(error).__name__}: {first}") from error
        if tuple(loss.shape):
            raise DataError(f"the loss must be one number for a batch, but has shape {tuple(loss.shape)}")

    def state_dict(self, model: ModelState) -> Params:
        """Returns the arrays by the paths of the variables."""
        return model.merged()

    def on(self, devices: Devices) -> Self:
        """Returns the same learner on other devices."""
        return dataclasses.replace(self, devices=devices)

    def describe(self) -> dict[str, Any]:
        """Returns what decides the learner's numbers, as JSON; the devices are left to the run's environment."""
        fields = dataclass_fields(self)
        settings = {name: fields[name] for name in fields if name not in ("devices", "eval_batch_size")}
        model = self.resident.model
        compiled = {"optimizer": _settings(model.optimizer), "loss": _settings(model.loss)}
        callbacks = [{"class": type(each).__name__, **describe(kept(each))} for each in self.callbacks]
        return {
            "name": type(self).__name__,
            **settings,
            **compiled,
            "callbacks": callbacks,
            "precision": self.devices.precision,
        }

    @cached_property
    def resident(self) -> ResidentModel:
        """The one model that all clients pass through."""
        return self._make(seed=0)

    @cached_property
    def stepper(self) -> Steps:
        """Takes the steps of the resident model."""
        return Steps(self.resident)

    @property
    def _replicas(self) -> int:
        return self.resident.replicas

    def _make(self, seed: int) -> ResidentModel:
        return ResidentModel(self.model, strategy_of(self.devices), self.devices.precision, seed)

    def _train(self, data: Dataset, rng: np.random.Generator) -> dict[str, float]:
        """Takes all steps of one call to ``fit``; returns the means over the examples of all epochs."""
        size = None if self.batch_size is None else self.batch_size * self._replicas
        sizes = batch_sizes(len(data), batch_size=size, epochs=self.epochs, steps=self.steps)
        a_pass = len(batch_sizes(len(data), batch_size=size, epochs=1, steps=None))
        batches = self.batches(data, draw_order(len(data), sum(sizes), rng), sizes, self.batch_size)
        steps, calls, means = self.stepper, self.calls(epochs=-(-len(sizes) // a_pass), steps=a_pass), _Means()
        seen = 0
        calls.begin()
        for number, (parts, counts) in enumerate(batches):
            epoch, step = divmod(number, a_pass)
            ends = step + 1 == a_pass or number + 1 == len(sizes)
            if step == 0:
                calls.begin_epoch(epoch)
            calls.begin_step(step)
            steps.train(parts, counts)
            seen += sum(counts)
            if calls:
                calls.end_step(step, steps.means())
            if ends or calls.stopping:  # Keras's metrics are an epoch's
                found = steps.means()
                calls.end_epoch(epoch, found)
                means.add(found, seen)
                steps.forget()
                seen = 0
            if calls.stopping:
                break
        calls.end(means.means())
        return means.means()

    def calls(self, *, epochs: int, steps: int) -> Calls:
        """Returns the callbacks for one training.

        Args:
            epochs: How many there will be.
            steps: Of an epoch.
        """
        leads = self.resident.workers.index == 0
        return Calls(self.callbacks, self.resident.model, leads=leads, epochs=epochs, steps=steps)

    def batches(
        self, data: Dataset, order: np.ndarray, sizes: Sequence[int], batch_size: int | None
    ) -> Generator[tuple[list[Part], list[int]]]:
        """Yields each step's examples, those of each replica of this process, and how many count on every replica.

        Args:
            data: Has them.
            order: Their indices, step by step.
            sizes: How many each step has, on all devices.
            batch_size: The most that a device has of them; None for no limit.
        """
        count = self._replicas
        shares = [part_of_rank(order, sizes, batch_size=batch_size, ranks=count, rank=rank) for rank in range(count)]
        here = self.resident.own_replicas
        done = [0] * count
        for number in range(len(sizes)):
            parts, counts = [], []
            for rank, (steps, own) in enumerate(shares):
                [piece] = steps[number]
                if rank in here:
                    parts.append(data.take(own[done[rank] : done[rank] + piece.computed]))
                counts.append(piece.count)
                done[rank] += piece.computed
            yield parts, counts


class _Means:
    """Means over several epochs, by their numbers of examples."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, means: dict[str, float], count: int) -> None:
        """Takes an epoch's means over so many examples."""
        for name, mean in means.items():
            self._sums[name] = self._sums.get(name, 0.0) + mean * count
        self._count += count

    def means(self) -> dict[str, float]:
        """Returns those of all epochs."""
        return {name: total / self._count for name, total in self._sums.items()}


def _settings(part: Any) -> Any:
    """Returns an optimizer or a loss as JSON: Keras's objects by their class and settings."""
    if hasattr(part, "get_config"):
        return {"class": type(part).__name__, **describe(part.get_config())}
    return describe(part)


def _takes_classes(loss: Any) -> bool:
    return isinstance(loss, keras.losses.SparseCategoricalCrossentropy) or loss == "sparse_categorical_crossentropy"
