"""One task that several sites are given, and what their replies to it are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from shoal import trees
from shoal.processes.tensors import Entry, TensorFile, dtype_name, read_only, write_tensors
from shoal.sites.state import Reply
from shoal.types import Array, Broadcast, LocalObjective, Params, Update


class SiteTask:
    """What all sites are given in one task: its arrays are written once, for all of them.

    Args:
        kind: ``train`` or ``evaluate``.
        broadcast: The model and the objective.
        ties: Further names that the model's state dict has, each with the one of the same array.
        seed: The run's.
    """

    def __init__(self, kind: str, broadcast: Broadcast, *, ties: Mapping[str, str], seed: int) -> None:
        self.kind = kind
        self.broadcast = broadcast
        self._seed = seed
        self._ties = dict(ties)
        self._scratch = _Scratch()
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
        return self._misfit(reply, reply.file.entries) or self._not_finite(reply.file)

    def _misfit(self, reply: Reply, entries: Mapping[str, Entry]) -> str | None:
        """Says how names, shapes or kinds of numbers differ from the model's; None where they do not."""
        model = self.broadcast.model
        may_lack = model.buffers if reply.tree == "delta" else {}
        for name, array in {**model.params, **model.buffers}.items():
            if name not in entries:
                if name in may_lack:
                    continue
                return f"it sent no {name}"
            if entries[name].shape != tuple(array.shape):
                return f"it sent {name} with shape {list(entries[name].shape)}, and {list(array.shape)} is expected"
            if "float" not in entries[name].dtype:
                return f"it sent {name} as {entries[name].dtype}, and {dtype_name(array)} is expected"
        unknown = sorted(entries.keys() - model.params.keys() - model.buffers.keys())
        return f"it sent {unknown[0]}, which the model does not have" if unknown else None

    def _not_finite(self, file: TensorFile) -> str | None:
        """Says which array holds NaN or infinity; None where none does."""
        tree = {**self.broadcast.model.params, **self.broadcast.model.buffers}
        size = trees.piece_size(tree)
        for name in file.entries:
            pieces = file.pieces(name, size, memory=self._scratch.raw(size), like=tree[name])
            if not all(trees.all_finite({name: piece}) for piece in pieces):
                return f"it sent NaN or infinity in {name}: try a smaller learning rate, or clip gradients"
        return None

    def update(self, reply: Reply) -> Update:
        """Returns a reply that has no problem as an update.

        Its arrays are read and subtracted when they are asked for, in pieces, so that a site's model is never in this
        process as a whole.
        """
        model = self.broadcast.model
        has_buffers = reply.file is not None and all(name in reply.file.entries for name in model.buffers)
        return Update(
            delta=_Difference(reply, model.params, self._scratch),
            buffers=_Difference(reply, model.buffers, self._scratch) if has_buffers else trees.zeros(model.buffers),
            weight=reply.examples,
            metrics=reply.metrics,
        )


class _Scratch:
    """Memory for one piece of an array: what is read, and the same in float64. All of a task's replies share it."""

    def __init__(self) -> None:
        self._raw = np.empty(0, np.uint8)
        self._wide = np.empty(0)

    def raw(self, size: int) -> np.ndarray:
        """Returns memory for so many numbers of any dtype, uint8."""
        if len(self._raw) < 8 * size:
            self._raw = np.empty(8 * size, np.uint8)
        return self._raw

    def wide(self, size: int) -> np.ndarray:
        """Returns memory for so many numbers, float64."""
        if len(self._wide) < size:
            self._wide = np.empty(size)
        return self._wide


class _Difference(trees.Computed):
    """What a site's training has changed, in float64, read as it is asked for.

    Args:
        reply: Has the arrays after training, or what has changed in them.
        before: The arrays before it, by the names to have.
        scratch: Has the piece that was computed last, of any reply.
    """

    def __init__(self, reply: Reply, before: Params, scratch: _Scratch) -> None:
        super().__init__(before)
        self._reply = reply
        self._scratch = scratch

    def pieces(self, name: str, size: int) -> Iterator[Array]:
        """Computes what has changed in an array."""
        if self._reply.file is None:
            raise KeyError(name)
        before = self.like[name]
        raw, wide = self._scratch.raw(size), self._scratch.wide(size)
        read = self._reply.file.pieces(name, size, memory=raw, like=before)
        for after, part in zip(read, trees.in_pieces(before, size), strict=True):
            found = _widened(wide[: len(part)], after)
            if self._reply.tree == "params":
                _subtract(found, part)
            yield found


def _widened(memory: np.ndarray, array: Array) -> Array:
    """Returns an array in float64, in memory of that dtype and of its shape, as an array of its own kind."""
    if isinstance(array, np.ndarray):
        np.copyto(memory, array)
        return memory
    import torch

    return torch.from_numpy(memory).copy_(array)


def _subtract(wide: Array, array: Array) -> None:
    """Subtracts an array from one in float64, in place; by numpy where it can, because torch would widen a copy."""
    if isinstance(array, np.ndarray) or array.dtype.itemsize not in (4, 8):
        wide -= array
    else:
        np.subtract(wide.numpy(), array.detach().numpy(), out=wide.numpy())
