"""A federation's state in its run folder, and back."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from shoal import trees
from shoal.algorithms import ServerState
from shoal.description import describe
from shoal.errors import CheckpointError, MissingExtraError, StorageError
from shoal.federation.experiment import Experiment
from shoal.federation.selection import Best
from shoal.runs import (
    Checkpoint,
    Checkpoints,
    MetricsLog,
    RunFolder,
    TensorBoardTracker,
    read_metrics,
    save_model,
    write_json,
    write_report,
)
from shoal.types import Array, ModelState, Params
from shoal.version import __version__


@dataclass(frozen=True, kw_only=True, eq=False)
class RunState:
    """Everything of a run that a crash must not lose."""

    state: ServerState
    """The method's state after the last whole round."""
    elapsed: float = 0.0
    """Seconds that the rounds have taken, resumed parts included."""
    best: Best | None = None
    """The best round so far."""
    best_model: ModelState | None = None
    """Its model."""

    @property
    def model(self) -> ModelState:
        """The model to deliver: the best where there is one, else the last."""
        return self.best_model or self.state.model


class RunStorage:
    """Writes a run's state to its folder; without a folder it does nothing.

    Args:
        folder: The open run folder, or None.
        keep: How many of the latest checkpoints to keep.
    """

    def __init__(self, folder: RunFolder | None, *, keep: int) -> None:
        self.folder = folder
        self.notices: list[str] = list(folder.notices) if folder else []
        self._saved_round = 0
        self._tensorboard: TensorBoardTracker | None = None
        if folder is not None:
            self._checkpoints = Checkpoints(folder.checkpoints, keep=keep)
            self._metrics = MetricsLog(folder.metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self.folder is not None:
            self.folder.close()

    def restore(self, start: ServerState) -> tuple[RunState, list[dict[str, Any]]]:
        """Returns the state and the history that the folder holds, or those of a run that has not begun.

        Whatever was written after the checkpoint that is used is removed, because the run will write it again.
        """
        loaded = self._checkpoints.load_latest() if self.folder else None
        if self.folder is None or loaded is None:
            if self.folder is not None:
                self._metrics.truncate(0)
            return RunState(state=start), []
        self.notices += loaded.notices
        self._checkpoints.discard_after(loaded.round)
        self._metrics.truncate(loaded.round)
        self._saved_round = loaded.round
        best = Best(**loaded.meta["best"]) if loaded.meta["best"] else None
        best_model = self._best_model(best, loaded, start) if best else None
        if best_model is None:
            best = None
        state = dataclasses.replace(unpacked(loaded.tensors, start), round=loaded.round)
        run = RunState(state=state, elapsed=loaded.meta["elapsed"], best=best, best_model=best_model)
        return run, read_metrics(self.folder.metrics)

    def _best_model(self, best: Best, loaded: Checkpoint, start: ServerState) -> ModelState | None:
        if best.round == loaded.round:
            return unpacked(loaded.tensors, start).model
        try:
            return unpacked(self._checkpoints.load(best.round).tensors, start).model
        except CheckpointError as error:
            self.notices.append(f"{error}; it was the best, which is chosen anew from round {loaded.round + 1} on")
            return None

    def open_tensorboard(self, wanted: bool | None, first_round: int) -> None:
        """Starts TensorBoard events, or leaves a notice where the library is missing and they were not asked for.

        Events of rounds that are run again replace the old ones.
        """
        if self.folder is None or wanted is False:
            return
        try:
            self._tensorboard = TensorBoardTracker(self.folder.tensorboard, first_round=first_round)
        except MissingExtraError as error:
            if wanted:
                raise
            self.notices.append(f"no TensorBoard events: {error}")

    def record(self, record: Mapping[str, Any]) -> None:
        """Adds a round's metrics."""
        if self.folder is None:
            return
        self._metrics.append(record)
        if self._tensorboard is not None:
            numbers = {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
            self._tensorboard.log(record["round"], numbers)

    def save(self, run: RunState) -> None:
        """Writes a checkpoint, unless the last one is of this round already."""
        state = run.state
        if self.folder is None or state.round == self._saved_round:
            return
        best = run.best
        meta = {"elapsed": run.elapsed, "best": dataclasses.asdict(best) if best else None}
        self._checkpoints.save(state.round, packed(state), meta, best=best.round if best else None)
        self._saved_round = state.round

    def save_partition(self, picture: Mapping[str, Any] | None) -> None:
        """Writes how the labels lie over the clients, for the report."""
        if self.folder is not None and picture is not None:
            write_json(self.folder.partition, picture)

    def deliver(self, params: Params, best: Best | None, rounds: int) -> None:
        """Writes the model to use."""
        if self.folder is None:
            return
        told = dataclasses.asdict(best) if best else {"round": rounds}
        # One key, because the format keeps several in no order, and equal runs shall leave equal files.
        save_model(self.folder.model, params, {"shoal": json.dumps({"version": __version__, **told})})

    def report(self) -> None:
        """Draws the report, or leaves a notice: a run whose model is delivered does not fail for want of a picture."""
        if self.folder is None:
            return
        try:
            write_report([self.folder.path])
        except (MissingExtraError, StorageError) as error:
            self.notices.append(f"no report: {error}")

    @property
    def path(self) -> Path | None:
        """The run folder's path."""
        return None if self.folder is None else self.folder.path


def environment(experiment: Experiment, engine: str) -> dict[str, Any]:
    """Returns what a run was made with, as JSON."""
    versions = {"shoal": __version__, "python": platform.python_version(), "numpy": np.__version__}
    for name in ("torch", "tensorflow"):
        if name in sys.modules:  # reported where it is in use, never imported for it
            versions[name] = str(sys.modules[name].__version__)
    return {
        "versions": versions,
        "platform": platform.platform(),
        "seed": experiment.seed,
        "engine": engine,
        "devices": describe(experiment.learner.devices),
        "command": sys.argv,
    }


def packed(state: ServerState) -> dict[str, Array]:
    """Returns all arrays of a state in one flat tree."""
    model = state.model
    slots = {f"slot.{name}": tree for name, tree in state.slots.items()}
    return trees.flatten({"params": model.params, "buffers": model.buffers, "constants": model.constants, **slots})


def unpacked(tensors: Params, like: ServerState) -> ServerState:
    """Undoes :func:`packed`, with the kind, dtypes and devices of the arrays of ``like``; the round is 0."""
    saved = trees.unflatten(tensors)

    def tree(name: str, reference: Params) -> dict[str, Array]:
        return trees.map_trees(lambda array, own: trees.cast_like(own, array), reference, saved.get(name, {}))

    model = ModelState(
        params=tree("params", like.model.params),
        buffers=tree("buffers", like.model.buffers),
        constants=tree("constants", like.model.constants),
    )
    return ServerState(
        round=0, model=model, slots={name: tree(f"slot.{name}", slot) for name, slot in like.slots.items()}
    )
