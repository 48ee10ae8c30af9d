"""What travels to a client's process and back, in shared memory."""

from __future__ import annotations

import traceback

import numpy as np

from shoal.data import Dataset, Subset
from shoal.engine import ClientResult, ClientTask
from shoal.engines.shared_trees import read_shared, write_shared
from shoal.errors import ClientError
from shoal.types import Broadcast, LocalObjective, ModelState, Update

EXTRA = "extra "
"""Heads the name of a tree that an algorithm asked for."""


def pack_broadcast(broadcast: Broadcast) -> int:
    """Returns the file descriptor of shared memory with the broadcast."""
    model, objective = broadcast.model, broadcast.objective
    corrected = objective.correction is not None
    meta = {"round": broadcast.round, "proximal": objective.proximal, "corrected": corrected}
    trees = {"params": model.params, "buffers": model.buffers, "constants": model.constants}
    return write_shared(meta, {**trees, "correction": objective.correction or {}})


def unpack_broadcast(fd: int) -> Broadcast:
    """Returns the broadcast, whose arrays are the shared memory."""
    meta, trees = read_shared(fd, copy=False)
    parts = {name: trees.get(name, {}) for name in ("params", "buffers", "constants")}
    correction = trees.get("correction", {}) if meta["corrected"] else None
    objective = LocalObjective(proximal=meta["proximal"], correction=correction)
    return Broadcast(round=meta["round"], model=ModelState(**parts), objective=objective)


def pack_task(task: ClientTask, indices: np.ndarray) -> int:
    """Returns the file descriptor of shared memory with a task.

    Args:
        task: What to do.
        indices: Where its samples lie in the data set that both processes have.
    """
    meta = {"client": task.client, "seed": task.seed, "round": task.round}
    return write_shared(meta, {"data": {"indices": np.asarray(indices, np.int64)}})


def unpack_task(fd: int, dataset: Dataset) -> ClientTask:
    """Returns the task, with its samples in ``dataset``."""
    meta, trees = read_shared(fd, copy=True)
    return ClientTask(data=Subset(dataset, trees["data"]["indices"]), **meta)


def pack_result(result: ClientResult) -> int:
    """Returns the file descriptor of shared memory with an update, or with an error as text."""
    update = result.update
    if update is None:
        error = result.error or ClientError("neither an update nor an error")
        told = "".join(traceback.format_exception(error))
        return write_shared({"error": in_words(error), "traceback": told}, {})
    meta = {
        "weight": float(update.weight),
        "metrics": {name: float(value) for name, value in update.metrics.items()},
        "extras": list(update.extras),
    }
    extras = {EXTRA + name: tree for name, tree in update.extras.items()}
    return write_shared(meta, {"delta": update.delta, "buffers": update.buffers, **extras})


def unpack_result(fd: int, client: int) -> ClientResult:
    """Returns what came of a client."""
    meta, trees = read_shared(fd, copy=True)
    if "error" in meta:
        error = ClientError(meta["error"])
        error.add_note(f"In the process of client {client}:\n{meta['traceback']}")
        return ClientResult(client=client, error=error)
    update = Update(
        delta=trees.get("delta", {}),
        weight=meta["weight"],
        buffers=trees.get("buffers", {}),
        metrics=meta["metrics"],
        extras={name: trees.get(EXTRA + name, {}) for name in meta["extras"]},
    )
    return ClientResult(client=client, update=update)


def in_words(error: Exception) -> str:
    """Returns an error's type and message."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
