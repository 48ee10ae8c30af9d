"""A model in training on one site's devices, step by step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shoal.data import Dataset
from shoal.learners.base import Batching, never
from shoal.learners.batches import Piece, check_divisible, draw_order, draw_seed, part_of_rank
from shoal.learners.torch_devices import computing, process_devices
from shoal.learners.torch_evaluation import RankedEvaluation
from shoal.learners.torch_loading import training_batches
from shoal.learners.torch_model import reseed, seeded
from shoal.learners.torch_optimizer_state import pack_optimizer, unpack_optimizer
from shoal.learners.torch_ranks import Ranks, explained
from shoal.learners.torch_step import Stepper
from shoal.learners.torch_strategies import spread
from shoal.learners.torch_tally import Tally
from shoal.learners.torch_trace import recorded
from shoal.learners.torch_usage import Usage
from shoal.randomness import further_seed, generator
from shoal.trees import flatten, nbytes, unflatten
from shoal.types import ModelState, Params

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner


class TorchTraining:
    """A learner's model on its devices, from the first step of a training to the last.

    What it computes is a function of the learner, the data and the seed, whatever the number of ranks: a step's
    examples, and their mean gradient, are those of one device with a batch of the same effective size. The order of an
    epoch is drawn from (seed, epoch), and noise from (seed, step, rank), so there are no random states to keep.

    Args:
        learner: Says what to train and how, and on which devices.
        data: All examples.
        epochs: Passes over them.
        seed: Decides the first parameters, the order of the examples and the noise.
        ranks: Those that train together.
        scale_lr: Whether learning rates are multiplied with the effective batch by that of one device (Goyal et al.
            2017, section 2.1).

    Raises:
        ConfigurationError: The devices or the optimizer cannot do it.
        DataError: There are fewer examples than devices.
    """

    def __init__(
        self, learner: TorchLearner, data: Dataset, *, epochs: int, seed: int, ranks: Ranks, scale_lr: bool = False
    ) -> None:
        self.accelerator = learner.device.type
        """The kind of device that the model is on."""
        self._ranks = ranks
        self.rank = ranks.rank
        """Which rank this is."""
        self.ranks = ranks.count
        """How many there are."""
        self._learner = learner
        self._data = data
        self._seed = seed
        self._devices = process_devices(learner.devices)
        self._per_process = len(self._devices)
        self.batching = Batching(
            per_device=learner.batch_size or -(-len(data) // (ranks.count * self._per_process)),
            devices=ranks.count * self._per_process,
            accumulate=learner.accumulate,
        )
        check_divisible(len(data), self.batching.devices)
        self.steps_per_epoch = -(-len(data) // self.batching.effective)
        self.steps = self.steps_per_epoch * epochs
        self.step = 0
        """How many steps are done."""
        learner.init(seed)
        self.model_bytes = nbytes(learner.resident.state().merged())
        """The size of the whole model."""
        self._model = spread(learner, ranks)
        self._evaluation = RankedEvaluation(learner, self._model, ranks)
        self._optimizer = learner.optimizer(list(self._model.params.values()))
        if scale_lr:
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * (self.batching.effective / self.batching.per_device)
        scales = learner.devices.precision == "fp16"
        self._scaler = torch.amp.GradScaler(learner.device.type) if scales else None
        self._stepper = Stepper(learner, self._model, self._optimizer, None, self._scaler)
        self._epoch: Generator[tuple[tuple[Piece, ...], list[tuple[Tensor, Tensor]]]] | None = None
        self._usage = Usage(learner.device)

    def advance(self, until: int, stop: Callable[[], bool] = never) -> tuple[dict[str, float], int]:
        """Takes steps, at most to the end of the epoch; waits for the device.

        Args:
            until: The number of steps to have done then, more than now.
            stop: Asked before each further step whether to leave it at that; with several ranks it must not say so.

        Returns:
            The loss and the metrics, as means over the examples of these steps on all ranks; how many examples.

        Raises:
            WorkerError: A rank is gone.
        """
        learner, tally = self._learner, Tally()
        self._model.module.train()
        quietly = seeded(learner.device, 0, *self._devices[1:])
        with quietly, computing(learner.device, learner.devices.threads), explained():
            while self.step < until:
                if self._epoch is None:
                    self._epoch = self._open_epoch()
                self._take(*next(self._epoch), tally)
                self.step += 1
                if self.step % self.steps_per_epoch == 0:
                    self._end_epoch()
                    break
                if stop():
                    break
            means, examples = tally.over_ranks(self._ranks)
        self._usage.look()
        return means, examples

    def _end_epoch(self) -> None:
        if self._epoch is not None:
            self._epoch.close()
            self._epoch = None

    def _take(self, parts: Sequence[Piece], batches: Sequence[tuple[Tensor, Tensor]], tally: Tally) -> None:
        reseed(self._devices, further_seed(self._seed, "noise", round=self.step, client=self._ranks.rank))
        self._stepper.set_rates(self.step, self.steps, self.steps_per_epoch)
        self._stepper.take_pieces(parts, batches, tally, ranks=self._ranks.count)

    def _open_epoch(self) -> Generator[tuple[tuple[Piece, ...], list[tuple[Tensor, Tensor]]]]:
        """Yields what is left of the epoch: each step's pieces of this rank, and their samples."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        learner, ranks, size, total = self._learner, self._ranks, self.batching.effective, len(self._data)
        rng = generator(self._seed, "fit", round=epoch + 1)
        draw_seed(rng)  # as in a client's training, which an epoch is
        order = draw_order(total, total, rng)
        steps, own = part_of_rank(
            order[done * size :],
            [min(size, total - start) for start in range(done * size, total, size)],
            batch_size=self.batching.per_device * self._per_process,
            ranks=ranks.count,
            rank=ranks.rank,
        )
        batches = training_batches(
            learner.samples,
            self._data,
            own,
            [piece.computed for step in steps for piece in step],
            workers=learner.workers,
            device=learner.device,
        )
        for step in steps:
            yield step, [next(batches) for _ in step]

    def evaluate(self, data: Dataset) -> dict[str, float]:
        """Returns the loss and the metrics, as means over ``data``: the same bits on any number of ranks.

        Raises:
            DataError: There is no example.
            WorkerError: A rank is gone.
        """
        return self._evaluation.evaluate(data)

    def confusion(self, data: Dataset) -> np.ndarray | None:
        """Returns how many examples of each class were taken for which, int64 [classes, classes]; None for no classes.

        Raises:
            WorkerError: A rank is gone.
        """
        return self._evaluation.confusion(data)

    def rates(self) -> list[float]:
        """Returns the learning rates of the optimizer's groups, as of the last step."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def usage(self) -> list[tuple[float, float]]:
        """Returns each rank's peak memory in bytes, and the share of time that its device was busy; NaN: unknown.

        Raises:
            WorkerError: A rank is gone.
        """
        return [(peak, busy) for peak, busy in self._ranks.gather(self._usage.read())]

    def recorded(self, path: Path) -> AbstractContextManager[None]:
        """Returns the context in which torch's profiler records what this rank does, into a file of Chrome's JSON.

        Raises:
            StorageError: The file cannot be written.
        """
        return recorded(path, self._learner.device)

    def agreed(self, seconds: float) -> float:
        """Returns what rank 0 says.

        Raises:
            WorkerError: A rank is gone.
        """
        return self._ranks.from_leader([seconds])[0]

    def model(self) -> ModelState:
        """Returns copies of the whole model's arrays, on the CPU; every rank must ask."""
        return self._model.state()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns all that a crash must not lose, as tensors on the CPU and JSON; every rank must ask.

        The tensors are on rank 0 alone, which writes them.

        Raises:
            ConfigurationError: The optimizer keeps something that is neither numbers nor tensors.
        """
        kept, optimizer = pack_optimizer(self._optimizer, self._model.params, keep=self._ranks.leads)
        scaler = None if self._scaler is None else self._scaler.state_dict()
        model = self._model.state(keep=self._ranks.leads)
        return _flat(model) | kept, {"step": self.step, "optimizer": optimizer, "scaler": scaler}

    def put(self, model: ModelState | None) -> None:
        """Replaces the model's arrays by those that rank 0 gives; the others give None."""
        shared, _ = self._ranks.share(None if model is None else _flat(model), {})
        self._fill(shared)

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies whole arrays, by names such as ``params/…``, into the model."""
        trees = unflatten(tensors)
        self._model.load(ModelState(**{part: trees.get(part, {}) for part in ("params", "buffers", "constants")}))

    def restore(self, tensors: Params | None, meta: Mapping[str, Any] | None) -> dict[str, Any]:
        """Goes on from a state, which may have been written by another number of ranks.

        Args:
            tensors: As :meth:`state` gave them; None on ranks other than 0, and where there is no state.
            meta: Likewise, and further JSON.

        Returns:
            The JSON of rank 0; empty where there is no state.

        Raises:
            WorkerError: A rank is gone.
        """
        shared, told = self._ranks.share(tensors, meta)
        if not told:
            return {}
        self._fill(shared)
        unpack_optimizer(self._optimizer, self._model.params, shared, told["optimizer"])
        if self._scaler is not None:
            self._scaler.load_state_dict(told["scaler"])
        self._end_epoch()
        self.step = int(told["step"])
        return told

    def close(self) -> None:
        """Ends what reads ahead, and lets go of the spread model, which must not outlive the ranks' group."""
        self._end_epoch()
        self._model.close()
        del self._model, self._evaluation, self._stepper
        if self.ranks > 1:
            gc.collect()  # torch's wrappers refer to themselves


def _flat(model: ModelState) -> dict[str, Tensor]:
    """Returns a model's arrays in one flat tree."""
    return flatten({"params": model.params, "buffers": model.buffers, "constants": model.constants})
