"""A model in training on one site's devices, step by step."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shoal.data import Dataset
from shoal.errors import ConfigurationError, DataError
from shoal.learners.base import Batching, never
from shoal.learners.batches import Piece, draw_order, draw_seed, pieces
from shoal.learners.torch_devices import computing, cuda_ids
from shoal.learners.torch_loading import training_batches
from shoal.learners.torch_model import reseed, seeded
from shoal.learners.torch_optimizer_state import pack_optimizer, unpack_optimizer
from shoal.learners.torch_ranks import Ranks, explained
from shoal.learners.torch_step import Stepper, needs_closure
from shoal.learners.torch_strategies import SpreadModel, check_strategy, fill, whole
from shoal.learners.torch_tally import Tally, mean
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
        devices = learner.devices
        self._devices = [learner.device]
        if devices.strategy == "dp":
            self._devices = [torch.device("cuda", index) for index in cuda_ids(devices, torch.cuda.device_count())]
        self._per_process = len(self._devices)
        self.batching = Batching(
            per_device=learner.batch_size or -(-len(data) // (ranks.count * self._per_process)),
            devices=ranks.count * self._per_process,
            accumulate=learner.accumulate,
        )
        if len(data) < self.batching.devices:
            raise DataError(f"{len(data)} examples cannot be divided among {self.batching.devices} devices: use fewer")
        self.steps_per_epoch = -(-len(data) // self.batching.effective)
        self.steps = self.steps_per_epoch * epochs
        self.step = 0
        """How many steps are done."""
        learner.init(seed)
        resident = learner.resident
        self.model_bytes = nbytes(resident.state().merged())
        """The size of the whole model."""
        check_strategy(devices, learner.device, resident.module, resident.params, compiles=learner.compile)
        if ranks.count > 1:
            _check_optimizer(learner.optimizer(list(resident.params.values())))
        self._model = SpreadModel(resident, devices, ranks)
        self._optimizer = learner.optimizer(list(self._model.params.values()))
        if scale_lr:
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * (self.batching.effective / self.batching.per_device)
        scales = devices.precision == "fp16"
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
                parts, batches = next(self._epoch)
                self._take(parts, batches, tally)
                self.step += 1
                if self.step % self.steps_per_epoch == 0:
                    self._end_epoch()
                    break
                if stop():
                    break
            means, examples = self._over_ranks(tally)
        self._usage.look()
        return means, examples

    def _end_epoch(self) -> None:
        if self._epoch is not None:
            self._epoch.close()
            self._epoch = None

    def _take(self, parts: Sequence[Piece], batches: Sequence[tuple[Tensor, Tensor]], tally: Tally) -> None:
        learner = self._learner
        reseed(self._devices, further_seed(self._seed, "noise", round=self.step, client=self._ranks.rank))
        if learner.schedule:
            self._stepper.set_rates(learner.schedule(self.step, self.steps, self.steps_per_epoch))
        # The strategies take the mean over the ranks.
        count = self._ranks.count
        taken = [learner.step_batch(pair, part.share * count) for pair, part in zip(batches, parts, strict=True)]
        for part, means in zip(parts, self._stepper.take(taken), strict=True):
            tally.add(means, part.count)

    def _open_epoch(self) -> Generator[tuple[tuple[Piece, ...], list[tuple[Tensor, Tensor]]]]:
        """Yields what is left of the epoch: each step's pieces of this rank, and their samples."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        size, ranks, total = self.batching.effective, self._ranks, len(self._data)
        rng = generator(self._seed, "fit", round=epoch + 1)
        draw_seed(rng)  # as in a client's training, which an epoch is
        order = draw_order(total, total, rng)
        starts = range(done * size, total, size)
        steps = [
            pieces(
                min(size, total - start),
                batch_size=self.batching.per_device * self._per_process,
                ranks=ranks.count,
                rank=ranks.rank,
            )
            for start in starts
        ]
        picked = [
            # A rank with nothing to do computes one example, of which nothing counts.
            order[start + piece.start : start + piece.start + piece.count] if piece.count else order[start : start + 1]
            for start, step in zip(starts, steps, strict=True)
            for piece in step
        ]
        batches = self._batches(self._data, picked)
        for step in steps:
            yield step, [next(batches) for _ in step]

    def _batches(self, data: Dataset, picked: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of samples on the device, read ahead where the learner says so."""
        learner = self._learner
        sizes = [len(part) for part in picked]
        return training_batches(
            learner.samples, data, np.concatenate(picked), sizes, workers=learner.workers, device=learner.device
        )

    def _over_ranks(self, tally: Tally) -> tuple[dict[str, float], int]:
        """Returns the means over the examples of all ranks, and how many these are."""
        values, examples = tally.read(), tally.examples
        own = [mean(each, examples) if sum(examples) else 0.0 for each in values.values()]
        rows = self._ranks.gather([*own, float(sum(examples))])
        counts = [int(row[-1]) for row in rows]
        return {name: mean([row[index] for row in rows], counts) for index, name in enumerate(values)}, sum(counts)

    def evaluate(self, data: Dataset) -> dict[str, float]:
        """Returns the loss and the metrics, as means over ``data``: the same bits on any number of ranks.

        The ranks take the batches in turn; none is computed twice for the mean.

        Raises:
            DataError: There is no example.
            WorkerError: A rank is gone.
        """
        tally = Tally()
        for output, targets, count in self._evaluated(data):
            means = {"loss": self._learner.loss(output, targets), **self._learner.measure(output, targets)}
            tally.add(means, count)
        values = tally.read()
        own = [*chain.from_iterable(values.values()), *map(float, tally.examples)]
        tables = [np.reshape(row, (len(values) + 1, -1)) for row in self._ranks.gather(own)]
        # The batches in their own order: the second of rank 0 comes after the first of the last rank.
        ordered: list[list[float]] = np.stack(tables).transpose(1, 2, 0).reshape(len(values) + 1, -1).tolist()
        *columns, counts = ordered
        examples = [int(count) for count in counts]
        return {name: mean(column, examples) for name, column in zip(values, columns, strict=True)}

    def confusion(self, data: Dataset) -> np.ndarray | None:
        """Returns how many examples of each class were taken for which, int64 [classes, classes]; None for no classes.

        Raises:
            WorkerError: A rank is gone.
        """
        total: Tensor | None = None
        for output, targets, count in self._evaluated(data):
            if not self._learner.classifies(output, targets) or output.ndim != 2:
                return None
            classes = output.shape[1]
            labels, taken = targets[:count].long(), output[:count].argmax(1)
            known = labels >= 0  # below are those that the loss leaves out
            found = torch.bincount((labels * classes + taken)[known], minlength=classes * classes)
            total = found if total is None else total + found
        if total is None:
            return None
        table: np.ndarray = np.sum(self._ranks.gather(total.double().tolist()), axis=0).astype(np.int64)
        side = math.isqrt(len(table))
        return table.reshape(side, side)

    def _evaluated(self, data: Dataset) -> Iterator[tuple[Any, Tensor, int]]:
        """Yields this rank's outputs and targets, as many batches as any rank has; of one too many 0 examples count."""
        if len(data) == 0:
            raise DataError("there is no example to evaluate on")
        self._align_buffers()
        learner, ranks = self._learner, self._ranks
        size = learner.eval_batch_size
        cuts = [np.arange(start, min(start + size, len(data))) for start in range(0, len(data), size)]
        own = range(ranks.rank, -(-len(cuts) // ranks.count) * ranks.count, ranks.count)
        picked = [cuts[number] if number < len(cuts) else cuts[0] for number in own]
        batches = self._batches(data, picked)
        self._model.module.eval()
        with (
            seeded(learner.device, 0),
            torch.no_grad(),
            computing(learner.device, learner.devices.threads),
            learner.autocast(),
            explained(),
        ):
            for number, (inputs, targets) in zip(own, batches, strict=True):
                output = self._model.evaluate(learner.transformed(inputs))
                yield output, targets, len(targets) if number < len(cuts) else 0

    def _align_buffers(self) -> None:
        """Gives every rank the buffers of rank 0; running statistics are those of a rank's own part of each batch."""
        if self.ranks > 1:
            for buffer in self._model.module.buffers():
                self._ranks.align(buffer)

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
        return self._gathered(keep=True)

    def _gathered(self, *, keep: bool) -> ModelState:
        """Returns the whole model, or nothing where only the other ranks want it."""
        self._align_buffers()

        def gathered(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = ((name, whole(array.detach())) for name, array in arrays.items())
            return {name: array.cpu().clone() for name, array in found if keep}

        buffers = self._learner.resident.buffers
        return ModelState(
            params=gathered(self._model.params), buffers=gathered(buffers), constants=gathered(self._constants())
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns all that a crash must not lose, as tensors on the CPU and JSON; every rank must ask.

        The tensors are on rank 0 alone, which writes them.

        Raises:
            ConfigurationError: The optimizer keeps something that is neither numbers nor tensors.
        """
        kept, optimizer = pack_optimizer(self._optimizer, self._model.params, keep=self._ranks.leads)
        scaler = None if self._scaler is None else self._scaler.state_dict()
        model = self._gathered(keep=self._ranks.leads)
        return _flat(model) | kept, {"step": self.step, "optimizer": optimizer, "scaler": scaler}

    def put(self, model: ModelState | None) -> None:
        """Replaces the model's arrays by those that rank 0 gives; the others give None."""
        shared, _ = self._ranks.share(None if model is None else _flat(model), {})
        self._fill(shared)

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies whole arrays, by names such as ``params/…``, into the model."""
        self._model.drop_gathered()
        trees = unflatten(tensors)
        own: dict[str, Mapping[str, Tensor]] = {
            "params": self._model.params,
            "buffers": self._learner.resident.buffers,
            "constants": self._constants(),
        }
        for part, arrays in own.items():
            for name, array in arrays.items():
                fill(array, trees[part][name])

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
        del self._model, self._stepper
        if self.ranks > 1:
            gc.collect()  # torch's wrappers refer to themselves

    def _constants(self) -> Mapping[str, Tensor]:
        """Returns the model's other arrays, which a strategy may have replaced."""
        current = dict(self._model.module.named_parameters()) | dict(self._model.module.named_buffers())
        return {name: current[name] for name in self._learner.resident.constants}


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if needs_closure(optimizer):
        raise ConfigurationError(
            f"{type(optimizer).__name__} searches along a line by itself, which several ranks would do "
            "each in its own way: use one device, or another optimizer"
        )


def _flat(model: ModelState) -> dict[str, Tensor]:
    """Returns a model's arrays in one flat tree."""
    return flatten({"params": model.params, "buffers": model.buffers, "constants": model.constants})
