"""A training's state in its run folder, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from shoal import trees
from shoal.errors import CheckpointError
from shoal.runs import Checkpoints, Choice, RunFolder, RunWriter, read_metrics, write_json
from shoal.training.result import ClassReport
from shoal.types import ModelState, Params


@dataclass(kw_only=True)
class Progress:
    """How far a training has come, beside the model and the optimizer."""

    epochs: int = 0
    """How many epochs have ended, and were measured and recorded."""
    elapsed: float = 0.0
    """Seconds of training and measuring, resumed parts included."""
    best: Choice | None = None
    """The best epoch so far."""
    best_step: int | None = None
    """The step at its end."""
    chunks: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Of the epoch that is not done yet: numbers of examples, and means over them."""
    seconds: float = 0.0
    """What that epoch has taken until now."""

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON, which has no NaN and no infinity: numbers are written as text where there may be some."""
        best = self.best and {**asdict(self.best), "value": str(self.best.value)}
        chunks = [(count, {name: str(mean) for name, mean in means.items()}) for count, means in self.chunks]
        return {**asdict(self), "best": best, "chunks": chunks}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """Undoes :meth:`as_json`."""
        best = Choice(**{**told["best"], "value": float(told["best"]["value"])}) if told["best"] else None
        chunks = [(count, {name: float(mean) for name, mean in means.items()}) for count, means in told["chunks"]]
        return cls(**{**told, "best": best, "chunks": chunks})


class TrainingStorage(RunWriter):
    """Writes a training's state to its folder; without a folder it does nothing.

    Args:
        folder: The open run folder, or None; None on ranks other than 0.
        keep: How many of the latest checkpoints to keep.
    """

    def __init__(self, folder: RunFolder | None, *, keep: int) -> None:
        super().__init__(folder)
        self._checkpoints = None if folder is None else Checkpoints(folder.checkpoints, keep=keep, unit="step")

    def restore(self) -> tuple[Params | None, dict[str, Any] | None]:
        """Returns the arrays and the JSON that the folder holds, with the records so far; None where there is nothing.

        Whatever was written after the checkpoint that is used is removed, because the training will write it again.
        """
        if self.folder is None or self._checkpoints is None:
            return None, None
        loaded = self._checkpoints.load_latest()
        if loaded is None:
            self.forget_after(0)
            return None, None
        self.notices += loaded.notices
        self._checkpoints.discard_after(loaded.number)
        self.forget_after(loaded.meta["run"]["epochs"])
        records = read_metrics(self.folder.metrics)
        history = [{key: math.nan if value is None else value for key, value in record.items()} for record in records]
        return loaded.tensors, {**loaded.meta, "history": history}

    def best_model(self, step: int) -> ModelState | None:
        """Returns the model of a checkpoint; None where it cannot be read."""
        if self._checkpoints is None:
            return None
        try:
            parts = trees.unflatten(self._checkpoints.load(step).tensors)
        except CheckpointError as error:
            self.notices.append(f"{error}; it was the best, which is chosen anew from here on")
            return None
        names = ("params", "buffers", "constants")
        return ModelState(**{name: parts.get(name, {}) for name in names})

    def save(self, step: int, tensors: Params, meta: Mapping[str, Any], best_step: int | None) -> None:
        """Writes a checkpoint."""
        if self._checkpoints is not None:
            self._checkpoints.save(step, tensors, meta, best=best_step)

    def save_classes(self, reports: list[ClassReport]) -> None:
        """Writes the report by class."""
        if self.folder is not None and reports:
            write_json(self.folder.classes, [asdict(report) for report in reports])
