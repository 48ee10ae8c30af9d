"""One task that several sites are given, and what their replies to it are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from shoal import trees
from shoal.learners.base import Learner
from shoal.learners.script import ties_of
from shoal.processes.tensors import LazyTree, read_only, write_tensors
from shoal.sites.state import Reply
from shoal.types import Array, Broadcast, LocalObjective, ModelState, Params, Update


class SiteTask:
    """What all sites are given in one task: its arrays are written once, for all of them.

    Args:
        kind: ``train`` or ``evaluate``.
        broadcast: The model and the objective.
        learner: Knows under which further names the model's arrays are in its state dict.
        seed: The run's.
    """

    def __init__(self, kind: str, broadcast: Broadcast, learner: Learner, *, seed: int) -> None:
        self.kind = kind
        self.broadcast = broadcast
        self._seed = seed
        self._ties = ties_of(broadcast.model, learner.state_dict(broadcast.model))
        self.fd = -1
        self._number = 0

    def write(self, number: int) -> None:
        """Puts the arrays into shared memory.

        Args:
            number: The task's.
        """
        model, objective = self.broadcast.model, self.broadcast.objective
        self._number = number
        fd = write_tensors(
            trees.flatten(
                {
                    "params": model.params,
                    "buffers": model.buffers,
                    "constants": model.constants,
                    "correction": objective.correction or {},
                }
            )
        )
        try:
            self.fd = read_only(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Lets go of the shared memory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def message(self, client: int) -> dict[str, Any]:
        """Returns what a client is told of its task."""
        objective: LocalObjective = self.broadcast.objective
        return {
            "number": self._number,
            "kind": self.kind,
            "round": self.broadcast.round,
            "seed": self._seed,
            "client": client,
            "proximal": objective.proximal,
            "corrected": objective.correction is not None,
            "framework": trees.framework(self.broadcast.model.params),
            "ties": self._ties,
        }

    def problem(self, reply: Reply) -> str | None:
        """Says why a reply cannot be used; None if it can."""
        if self.kind == "evaluate":
            return None
        if reply.file is None:
            return "it sent no parameters"
        model = self.broadcast.model
        wanted = {**model.params, **({} if reply.tree == "delta" else model.buffers)}
        entries = reply.file.entries
        for name, array in wanted.items():
            if name not in entries:
                return f"it sent no {name}"
            if entries[name].shape != tuple(array.shape):
                return f"it sent {name} with shape {list(entries[name].shape)}, and {list(array.shape)} is expected"
        if unknown := sorted(entries.keys() - model.params.keys() - model.buffers.keys()):
            return f"it sent {unknown[0]}, which the model does not have"
        arrays = LazyTree(reply.file, {name: {**model.params, **model.buffers}[name] for name in entries})
        bad = next((name for name, array in arrays.items() if not trees.all_finite({name: array})), None)
        return f"it sent NaN or infinity in {bad}: try a smaller learning rate, or clip gradients" if bad else None


def update_of(reply: Reply, model: ModelState) -> Update:
    """Returns a reply as an update, whose arrays are read and subtracted when they are asked for."""
    if reply.file is None:
        raise ValueError("a reply without arrays is no update")
    wants_difference = reply.tree == "params"
    buffers = model.buffers if all(name in reply.file.entries for name in model.buffers) else {}
    return Update(
        delta=_Difference(LazyTree(reply.file, model.params), model.params if wants_difference else None),
        buffers=_Difference(LazyTree(reply.file, buffers), model.buffers if wants_difference else None)
        if buffers or not model.buffers
        else trees.zeros(model.buffers),
        weight=reply.examples,
        metrics=reply.metrics,
    )


class _Difference(Mapping[str, Array]):
    """A tree minus another in float64, array by array as they are asked for, so that neither is in memory as a whole.

    Args:
        after: The tree; read anew each time.
        before: The other one; None for the tree itself.
    """

    def __init__(self, after: Params, before: Params | None) -> None:
        self._after = after
        self._before = before

    def __getitem__(self, name: str) -> Array:
        array = self._after[name]
        if self._before is None:
            return trees.widen(array)
        return trees.difference({name: array}, {name: self._before[name]})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._after)

    def __len__(self) -> int:
        return len(self._after)
