"""A federation's state in its run folder, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal import trees
from shoal.algorithms import ServerState
from shoal.errors import CheckpointError
from shoal.federation.result import Best
from shoal.runs import Checkpoint, Checkpoints, RunFolder, RunWriter, read_metrics, write_json
from shoal.types import Array, ModelState, Params


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


class RunStorage(RunWriter):
    """Writes a federation's state to its folder; without a folder it does nothing.

    Args:
        folder: The open run folder, or None.
        keep: How many of the latest checkpoints to keep.
    """

    def __init__(self, folder: RunFolder | None, *, keep: int) -> None:
        super().__init__(folder)
        self._saved_round = 0
        if folder is not None:
            self._checkpoints = Checkpoints(folder.checkpoints, keep=keep)

    def restore(self, start: ServerState) -> tuple[RunState, list[dict[str, Any]]]:
        """Returns the state and the history that the folder holds, or those of a run that has not begun.

        Whatever was written after the checkpoint that is used is removed, because the run will write it again.
        """
        loaded = self._checkpoints.load_latest() if self.folder else None
        if self.folder is None or loaded is None:
            self.forget_after(0)
            return RunState(state=start), []
        self.notices += loaded.notices
        self._checkpoints.discard_after(loaded.number)
        self.forget_after(loaded.number)
        self._saved_round = loaded.number
        best = Best(**loaded.meta["best"]) if loaded.meta["best"] else None
        best_model = self._best_model(best, loaded, start) if best else None
        if best_model is None:
            best = None
        state = dataclasses.replace(unpacked(loaded.tensors, start), round=loaded.number)
        run = RunState(state=state, elapsed=loaded.meta["elapsed"], best=best, best_model=best_model)
        return run, read_metrics(self.folder.metrics)

    def _best_model(self, best: Best, loaded: Checkpoint, start: ServerState) -> ModelState | None:
        if best.round == loaded.number:
            return unpacked(loaded.tensors, start).model
        try:
            return unpacked(self._checkpoints.load(best.round).tensors, start).model
        except CheckpointError as error:
            self.notices.append(f"{error}; it was the best, which is chosen anew from round {loaded.number + 1} on")
            return None

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
