"""The tasks of a script in the form of calls, for scripts that were written for such an interface."""

from __future__ import annotations

from typing import Any

from shoal.client.loop import TaskSource
from shoal.client.task import Metrics, Task
from shoal.errors import ConfigurationError
from shoal.types import Params

_source: list[TaskSource] = []
"""Where this process's tasks come from: one, or none before :func:`init`."""

_next: list[Task] = []
"""The task that :func:`is_running` has found and :func:`receive` has not yet given out."""

_current: list[Task] = []
"""The task that was given out last."""


def init(model: Any = None, *, evaluate: bool = False) -> None:
    """Joins the federation; every rank of the site calls it, once, before the others of this module.

    Args:
        model: What a script that runs by itself starts from; see :func:`~shoal.client.tasks`.
        evaluate: Whether the script does tasks of kind ``evaluate`` too.

    Raises:
        ConfigurationError: It was called before.
        WorkerError: The server cannot be reached.
    """
    if _source:
        raise ConfigurationError("shoal.client.init() was called already: call it once, at the start of the script")
    _source.append(TaskSource(model, evaluate=evaluate))


def is_running() -> bool:
    """Tells whether there is a further task; it waits for that, and the answer is the same on all ranks of a site.

    Raises:
        ConfigurationError: :func:`init` was not called, or the last task was not replied to.
        WorkerError: The server, or another rank, is gone.
    """
    if not _next and (task := _opened().next_task()) is not None:
        _next.append(task)
    return bool(_next)


def receive() -> Task:
    """Returns the next task, on every rank.

    Raises:
        ConfigurationError: There is none: :func:`is_running` tells.
        WorkerError: The server, or another rank, is gone.
    """
    if not is_running():
        raise ConfigurationError("the federation is over: ask shoal.client.is_running() before each receive()")
    _current[:] = [_next.pop()]
    return _current[0]


def send(
    *,
    params: Any = None,
    delta: Params | None = None,
    examples: float | None = None,
    metrics: Metrics | None = None,
    buffers: Params | None = None,
) -> None:
    """Answers the task that was received last; :meth:`Task.reply` says how. Only rank 0's answer counts.

    Raises:
        ConfigurationError: There is no task to answer, or it was answered, or the answer is not whole.
        WorkerError: The server is gone.
    """
    if not _current:
        raise ConfigurationError("there is no task to answer: call shoal.client.receive() first")
    _current[0].reply(params=params, delta=delta, examples=examples, metrics=metrics, buffers=buffers)


def _opened() -> TaskSource:
    if not _source:
        raise ConfigurationError("call shoal.client.init() first, at the start of the script")
    return _source[0]
