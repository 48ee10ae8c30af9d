"""Blocks of equal shape, recorded: what of a block is the same each time, and what is copied in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal import trees
from shoal.learners.torch_blocks import Cutter, Schedule
from shoal.learners.torch_devices import DTYPES
from shoal.learners.torch_graphs import Recorder, Recordings
from shoal.learners.torch_memory import Pool
from shoal.learners.torch_model import BorrowedModule
from shoal.learners.torch_per_client import Convolution
from shoal.learners.torch_stacked_optimizer import optimizer_settings
from shoal.types import Broadcast, StackedUpdate

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner

MOST_STEPS = 256
"""A block of more steps is not recorded: its graph would take long to make, and much of the host's memory."""


@dataclass(frozen=True, eq=False)
class Start:
    """What all blocks of a round start from."""

    broadcast: Broadcast
    """The model and the local objective."""
    arrays: dict[str, Tensor]
    """The broadcast's parameters, and those buffers that change, on the device."""
    borrowed: BorrowedModule
    """The module, with the arrays that all clients share."""

    def on(self, arrays: dict[str, Tensor], correction: dict[str, Tensor] | None) -> Start:
        """Returns the same start with other arrays."""
        params = {name: arrays[name] for name in self.broadcast.model.params}
        objective = replace(self.broadcast.objective, correction=correction)
        model = replace(self.broadcast.model, params=params)
        return replace(self, broadcast=replace(self.broadcast, model=model, objective=objective), arrays=arrays)


@dataclass(frozen=True, eq=False)
class Work:
    """What the clients of one block do."""

    plan: Schedule
    """Its steps."""
    batches: Cutter
    """Cuts their batches."""
    convolution: Convolution
    """How convolutions run."""
    generators: Sequence[torch.Generator] = ()
    """Each client's, for dropout."""

    def generators_of(self, rows: Sequence[int] | None) -> Sequence[torch.Generator]:
        """Returns the generators of some of the clients, by row; None means all."""
        return self.generators if rows is None or not self.generators else [self.generators[row] for row in rows]


Run = Callable[[Start, Work, Pool], StackedUpdate]
"""Trains a block in memory of a pool."""


class RecordedBlocks:
    """Trains blocks by replaying what was recorded of blocks of the same shape.

    Args:
        learner: Says what to train and how.
        recorder: Records programs.
    """

    def __init__(self, learner: TorchLearner, recorder: Recorder) -> None:
        self._learner = learner
        self._recordings = Recordings(recorder, DTYPES[learner.devices.precision])
        self._recordable = self._settings() is not None

    @property
    def refused(self) -> bool:
        """Whether nothing is recorded: the optimizer cannot be, or something failed."""
        return not self._recordable or self._recordings.refusal is not None

    @property
    def warming_up(self) -> bool:
        """Whether the last block took longer than another like it will."""
        return self._recordings.last == "warm-up"

    def __len__(self) -> int:
        return len(self._recordings)

    def keep(self, convolution: str | None) -> None:
        """Lets go of the memory of all recordings, but for those of one way to run convolutions; None for all of it."""
        self._recordings.keep(lambda key: key[0] == convolution)

    def fit(self, start: Start, work: Work, run: Run, pool: Pool) -> StackedUpdate:
        """Returns what ``run`` gives, in memory that the next block may use.

        Args:
            start: What the clients start from.
            work: What they do.
            run: Does it.
            pool: The memory of blocks that are not replayed.
        """
        learner, resident = self._learner, self._learner.resident
        shape, settings = work.plan.shape, self._settings()
        recordable = shape is not None and len(shape) <= MOST_STEPS and work.batches.resident
        if not recordable or settings is None:
            return self._recordings.pass_by(lambda: run(start, work, pool))
        objective = start.broadcast.objective
        correction = resident.on_device(objective.correction or {})
        key = (work.convolution, len(work.plan.examples), shape, settings, objective.proximal, tuple(correction))
        # The module's own arrays are read in place: each round's values are copied into them.
        self._recordings.fix(resident, *work.batches.sources)

        def program(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            own = trees.unflatten(inputs)
            batches = work.batches.on(own["work"]["table"])
            begin = start.on(own["arrays"], own.get("correction"))
            return _tensors(run(begin, replace(work, batches=batches), Pool(learner.device)))

        inputs = {"arrays": start.arrays, "correction": correction, "work": {"table": work.batches.table}}
        found = self._recordings.run(
            key, program, trees.flatten(inputs), plain=lambda: _tensors(run(start, work, pool))
        )
        if self._recordings.last == "replay":
            pool.keep(0)  # a replay has memory of its own
        return _update(found, work)

    def _settings(self) -> str | None:
        return optimizer_settings(self._learner.optimizer(list(self._learner.resident.params.values())))


def _tensors(update: StackedUpdate) -> dict[str, Tensor]:
    """Returns the tensors of an update in one flat tree."""
    told = {"delta": update.delta, "buffers": update.buffers, "metrics": update.metrics}
    return trees.flatten({**told, "all": {"finite": update.finite}})


def _update(tensors: Mapping[str, Tensor], work: Work) -> StackedUpdate:
    """Undoes :func:`_tensors`; what is read at the end of the round is copied out of the recording's memory."""
    told = trees.unflatten(tensors)
    return StackedUpdate(
        delta=told["delta"],
        buffers=told.get("buffers", {}),
        weights=work.plan.examples.astype("float64"),
        metrics=trees.copy(told["metrics"]),
        finite=told["all"]["finite"].clone(),
    )
