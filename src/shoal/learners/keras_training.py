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
from shoal.learners.keras_model import replicas
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
        ConfigurationError: The learner has what a training does not call, or a schedule that cannot be scaled.
        DataError: There are fewer examples than devices.
    """

    rank = 0
    """One process has all devices."""
    ranks = 1
    """Likewise."""

    def __init__(self, learner: KerasLearner, data: Dataset, *, epochs: int, seed: int, scale_lr: bool) -> None:
        if learner.callbacks:
            raise ConfigurationError(
                "a KerasLearner's callbacks are for its fit in a federation; a training has patience=…, checkpoints, "
                "TensorBoard and callbacks=… of its own: leave callbacks out of the learner"
            )
        learner.init(seed)
        self._learner = learner
        self._data = data
        self._seed = seed
        self._resident = resident = learner.resident
        devices = replicas(resident.strategy)
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
            self._steps.train(parts, counts)
            examples += sum(counts)
            self.step += 1
            if self.step % self.steps_per_epoch == 0:
                self.close()
                break
            if stop():
                break
        return self._steps.means(), examples

    def close(self) -> None:
        """Ends what is left of an epoch."""
        if self._epoch is not None:
            self._epoch.close()
            self._epoch = None

    def _open_epoch(self) -> Batches:
        """Yields what is left of the epoch."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
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
        """Returns the process's peak memory in bytes, and the share of time that its CPUs were busy; NaN on a GPU."""
        now = time.perf_counter(), time.process_time()
        share = (now[1] - self._looked[1]) / max(now[0] - self._looked[0], 1e-9)
        self._looked = now
        peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return [(peak, share) if self.accelerator == "cpu" else (float("nan"), float("nan"))]

    def recorded(self, path: Path) -> AbstractContextManager[None]:  # noqa: ARG002 - as of others
        """Refuses: the recording is torch's.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "trace=True records with torch's profiler, and the model is Keras's: use tf.profiler.experimental"
        )

    def agreed(self, seconds: float) -> float:
        """Returns what rank 0 says, which this is."""
        return seconds

    def model(self) -> ModelState:
        """Returns copies of the model's arrays."""
        return self._resident.state()

    def put(self, model: ModelState | None) -> None:
        """Replaces the model's arrays."""
        if model is not None:
            self._resident.load(model)

    def state(self) -> tuple[Params, dict[str, Any]]:
        """Returns all that a crash must not lose, as arrays and JSON."""
        model = self.model()
        arrays = {"params": model.params, "buffers": model.buffers, "constants": model.constants}
        return flatten(arrays | {"optimizer": self._resident.optimizer_state()}), {"step": self.step}

    def restore(self, tensors: Params | None, meta: Mapping[str, Any] | None) -> dict[str, Any]:
        """Goes on from a state.

        Args:
            tensors: As :meth:`state` gave them; None where there is no state.
            meta: Likewise, and further JSON.

        Returns:
            The JSON; empty where there is no state.
        """
        if tensors is None or meta is None:
            return {}
        trees = unflatten(tensors)
        self._resident.load(ModelState(**{part: trees.get(part, {}) for part in ("params", "buffers", "constants")}))
        self._resident.load_optimizer(trees.get("optimizer", {}))
        self.close()
        self.step = int(meta["step"])
        return dict(meta)
