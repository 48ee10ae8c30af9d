"""A Keras model in training on one site's devices, step by step."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.data import Dataset
from shoal.errors import ConfigurationError
from shoal.learners.base import Batching, never
from shoal.learners.batches import batch_sizes, check_divisible, draw_order, draw_seed
from shoal.learners.keras_steps import Part
from shoal.randomness import further_seed, generator
from shoal.trees import flatten, nbytes, unflatten
from shoal.types import ModelState, Params

if TYPE_CHECKING:
    from shoal.learners.keras import KerasLearner

Batches = Generator[tuple[list[Part], list[int]]]


class KerasTraining:
    """A learner's model on its devices, from the first step of a training to the last.

    The order of an epoch is drawn from (seed, epoch), and noise from (seed, step), so there are no random states to
    keep; both are those of a torch learner's training.

    Args:
        learner: Says what to train and how, and on which devices.
        data: All examples.
        epochs: Passes over them.
        seed: Decides the first parameters, the order of the examples and the noise.
        scale_lr: Whether the learning rate is multiplied with the effective batch by that of one device.

    Raises:
        ConfigurationError: The learner's model has a schedule that cannot be scaled.
        DataError: There are fewer examples than devices.
    """

    def __init__(self, learner: KerasLearner, data: Dataset, *, epochs: int, seed: int, scale_lr: bool) -> None:
        learner.init(seed)
        self._learner = learner
        self._data = data
        self._seed = seed
        self._resident = resident = learner.resident
        devices = resident.replicas
        self._group = resident.workers
        self.rank = self._group.index
        """Which process this is of those that share the model."""
        self.ranks = self._group.count
        """How many there are; one where it has all devices."""
        check_divisible(len(data), devices)
        self.accelerator = resident.accelerator
        """The kind of device that the model is on."""
        self.batching = Batching(
            per_device=learner.batch_size or -(-len(data) // devices), devices=devices, accumulate=1
        )
        self.steps_per_epoch = -(-len(data) // self.batching.effective)
        self.steps = self.steps_per_epoch * epochs
        self.step = 0
        """How many steps are done."""
        self.model_bytes = nbytes(resident.state().merged())
        """The size of the whole model."""
        if scale_lr:
            resident.scale_rate(devices)
        self._steps = learner.stepper
        self._calls = learner.calls(epochs=epochs, steps=self.steps_per_epoch)
        self._epoch: Batches | None = None
        self._looked = time.perf_counter(), time.process_time()

    def advance(self, until: int, stop: Callable[[], bool] = never) -> tuple[dict[str, float], int]:
        """Takes steps, at most to the end of the epoch.

        Args:
            until: The number of steps to have done then, more than now.
            stop: Asked before each further step whether to leave it at that.

        Returns:
            The loss and the metrics, as means over the examples of these steps; how many examples.
        """
        examples = 0
        self._steps.begin()
        while self.step < until:
            if self._epoch is None:
                self._epoch = self._open_epoch()
            parts, counts = next(self._epoch)
            self._resident.reseed(further_seed(self._seed, "noise", round=self.step))
            place = self.step % self.steps_per_epoch
            self._calls.begin_step(place)
            self._steps.train(parts, counts)
            if self._calls:
                self._calls.end_step(place, self._steps.means())
            examples += sum(counts)
            self.step += 1
            if self.step % self.steps_per_epoch == 0:
                self.close()
                break
            if stop():
                break
        return self._steps.means(), examples

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        """Tells the learner's callbacks of an epoch, with ``val_`` before the names of what was measured."""
        logs: dict[str, float] = {}
        for key in record:
            name = key.removeprefix("train_")
            if name != key:
                logs |= {name: record[key]} | ({f"val_{name}": record[name]} if name in record else {})
        self._calls.end_epoch(self.step // self.steps_per_epoch - 1, logs)

    @property
    def stopping(self) -> bool:
        """Whether a callback of the learner wants no further epoch; what rank 0's say counts."""
        return bool(self._calls) and bool(self.agreed(float(self._calls.stopping)))

    def finish(self) -> None:
        """Tells the learner's callbacks of the end."""
        self._calls.end({})

    def close(self) -> None:
        """Ends what is left of an epoch."""
        if self._epoch is not None:
            self._epoch.close()
            self._epoch = None

    def _open_epoch(self) -> Batches:
        """Yields what is left of the epoch."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        held, rate = self._calls.state(), self._resident.rate
        self._calls.begin_epoch(epoch)
        if done:  # what that did is in the state already
            self._calls.restore(held)
            self._resident.put_rate(rate)
        size, total = self.batching.effective, len(self._data)
        rng = generator(self._seed, "fit", round=epoch + 1)
        draw_seed(rng)  # as in a client's training, which an epoch is
        order = draw_order(total, total, rng)
        sizes = batch_sizes(total, batch_size=size, epochs=1, steps=None)
        yield from self._learner.batches(self._data, order[done * size :], sizes[done:], self.batching.per_device)

    def evaluate(self, data: Dataset) -> dict[str, float]:
        """Returns the loss and the metrics, as means over ``data``.

        Raises:
            DataError: There is no example.
        """
        return self._learner.measure(data)

    def confusion(self, data: Dataset) -> np.ndarray | None:
        """Returns how many examples of each class were taken for which, int64 [classes, classes]; None: no classes."""
        if not self._learner.classifies:
            return None
        found: np.ndarray | None = None
        for start in range(0, len(data), self._learner.eval_batch_size):
            inputs, targets = data.take(np.arange(start, min(start + self._learner.eval_batch_size, len(data))))
            outputs = self._steps.outputs(inputs)
            if outputs.ndim != 2:
                return None
            found = np.zeros((outputs.shape[1],) * 2, np.int64) if found is None else found
            np.add.at(found, (targets.reshape(-1), outputs.argmax(1)), 1)
        return found

    def rates(self) -> list[float]:
        """Returns the optimizer's learning rate, as of the last step."""
        return [self._resident.rate]

    def usage(self) -> list[tuple[float, float]]:
        """Returns each process's peak memory in bytes, and the share of time that its CPUs were busy; NaN on a GPU."""
        now = time.perf_counter(), time.process_time()
        share = (now[1] - self._looked[1]) / max(now[0] - self._looked[0], 1e-9)
        self._looked = now
        peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        own = (peak, share) if self.accelerator == "cpu" else (float("nan"), float("nan"))
        return [(memory, busy) for memory, busy in self._group.gather(own)]

    def recorded(self, path: Path) -> AbstractContextManager[None]:  # noqa: ARG002 - as of others
        """Refuses: the recording is torch's.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "trace=True records with torch's profiler, and the model is Keras's: use tf.profiler.experimental"
        )

    def agreed(self, seconds: float) -> float:
        """Returns what rank 0 says."""
        return self._group.gather([seconds])[0][0]

    def model(self) -> ModelState:
        """Returns copies of the model's arrays."""
        return self._resident.state()

    def put(self, model: ModelState | None) -> None:
        """Replaces the model's arrays by those that rank 0 gives; the others give None."""
        trees, _ = self._group.share(None if model is None else _flat(model), None)
        if trees:
            self._resident.load(_model(trees))

    def state(self) -> tuple[Params, dict[str, Any]]:
        """Returns all that a crash must not lose, as arrays and JSON."""
        optimizer = flatten({"optimizer": self._resident.optimizer_state()})
        return {**_flat(self.model()), **optimizer}, {"step": self.step, "calls": self._calls.state()}

    def restore(self, tensors: Params | None, meta: Mapping[str, Any] | None) -> dict[str, Any]:
        """Goes on from a state.

        Args:
            tensors: As :meth:`state` gave them; None on ranks other than 0, and where there is no state.
            meta: Likewise, and further JSON.

        Returns:
            The JSON of rank 0; empty where there is no state.
        """
        self._calls.begin()
        arrays, told = self._group.share(tensors, meta)
        if not told:
            return {}
        self._resident.load(_model(arrays))
        self._resident.load_optimizer(unflatten(arrays).get("optimizer", {}))
        self._calls.restore(told["calls"])
        self.close()
        self.step = int(told["step"])
        return told


def _flat(model: ModelState) -> Params:
    return flatten({"params": model.params, "buffers": model.buffers, "constants": model.constants})


def _model(arrays: Params) -> ModelState:
    """Undoes :func:`_flat`; further arrays do not matter."""
    trees = unflatten(arrays)
    return ModelState(**{kind: trees.get(kind, {}) for kind in ("params", "buffers", "constants")})
