"""The tasks of a script, one after the other, the same on all ranks of its site."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np

from shoal.client.link import Link, connected
from shoal.client.state_dicts import arrays_by_name
from shoal.client.task import Task
from shoal.errors import ConfigurationError, WorkerError
from shoal.processes.rest import rest_at_exit
from shoal.processes.tensors import TensorFile, entries_of, view
from shoal.sites.state import WAITING
from shoal.types import Array, LocalObjective, ModelState, Params

ROLES = ("params", "buffers", "constants", "correction")
"""What the arrays of a task are, by the heads of their names."""


_at: list[Task] = []
"""The task that this process was given last, while there are tasks."""


def current_task() -> Task | None:
    """Returns the task that this process is at; None before the first and after the last."""
    return _at[0] if _at else None


class TaskSource:
    """Gives this rank its tasks.

    Args:
        model: What a script that runs by itself starts from: a module, a Keras model, or arrays by name.
        evaluate: Whether the script also does tasks of kind ``evaluate``.
    """

    def __init__(self, model: Any = None, *, evaluate: bool = False) -> None:
        rest_at_exit()
        self._model = model
        self._evaluate = evaluate
        self._link = connected()
        self._current: Task | None = None
        self._over = False

    def next_task(self) -> Task | None:
        """Waits for the next task; None when there is none any more, on all ranks alike.

        Raises:
            ConfigurationError: The last task was not replied to.
            WorkerError: The server, or another rank, is gone.
        """
        if self._over:
            return None
        if self._link is None:
            self._current = self._local_task() if self._current is None else None
        else:
            self._check_replied(self._link)
            self._current = self._receive(self._link)
            if self._current is None:
                self._link.leave(early=False)
        self._over = self._current is None
        _at[:] = [] if self._current is None else [self._current]
        return self._current

    def leave(self) -> None:
        """Tells the server that this rank takes no more tasks; without effect once there are none."""
        _at.clear()
        if self._link is not None and not self._over:
            self._link.leave(early=True)

    def _check_replied(self, link: Link) -> None:
        task = self._current
        if task is not None and not task.replied and link.rank == 0:
            raise ConfigurationError(
                f"the script went on without a reply to the task to {task.kind} in round {task.round}: "
                "call task.reply(…) on rank 0 in each turn of the loop"
            )

    def _receive(self, link: Link) -> Task | None:
        link.do(WAITING, evaluates=self._evaluate)
        order, fd = link.next_order()
        if "task" not in order:
            if order.get("end") != "done":
                raise WorkerError(f"the federation has ended: {order.get('end')}")
            return None
        told = order["task"]
        link.do(f"task {told['number']}")
        trees = _arrays(fd, told["framework"])
        correction = trees["correction"] if told["corrected"] else None
        return Task(
            kind=told["kind"],
            round=told["round"],
            rounds=told["rounds"],
            site=link.site,
            client=told["client"],
            run_seed=told["seed"],
            objective=LocalObjective(proximal=told["proximal"], correction=correction),
            config=link.welcome["config"],
            model=ModelState(params=trees["params"], buffers=trees["buffers"], constants=trees["constants"]),
            number=told["number"],
            _ties=told["ties"],
            _link=link,
        )

    def _local_task(self) -> Task:
        state: Params = {}
        if self._model is not None:
            state = arrays_by_name(self._model)
        # As the server would: what the script does to its model must not change what it started from.
        kept = {name: array.clone() if hasattr(array, "clone") else np.array(array) for name, array in state.items()}
        return Task(kind="train", round=1, rounds=1, site="local", config=config(), model=ModelState(params=kept))


def config() -> Mapping[str, Any]:
    """Returns this site's own settings, before the first task; they are every task's ``config``.

    A script that is started by hand has those in the environment variable ``SHOAL_CONFIG``, as JSON.

    Raises:
        ConfigurationError: The variable holds no JSON object.
        WorkerError: The server cannot be reached.
    """
    link = connected()
    if link is not None:
        return dict(link.welcome["config"])
    said = os.environ.get("SHOAL_CONFIG", "{}")
    try:
        found = json.loads(said)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError(f'SHOAL_CONFIG must be a JSON object such as {{"lr": 0.1}}, not {said!r}')
    return found


def tasks(model: Any = None, *, evaluate: bool = False) -> Iterator[Task]:
    """Yields what the federation wants of this site, until it is over; every rank of the site calls it alike.

    Example::

        for task in shoal.client.tasks():
            task.load(net)
            ...  # DDP, FSDP, anything
            task.reply(params=net.state_dict(), examples=len(data), metrics={"loss": loss})

    All ranks get each task, and the end too; rank 0 alone replies. A script that is started by
    hand, with ``python`` or ``torchrun``, gets one task to train and then the end.

    Args:
        model: What such a script starts from: a module or a Keras model, or its arrays by name; ``task.params`` has
            those then. A script that only calls ``task.load(net)`` needs none. In a federation it is not used.
        evaluate: Whether the script does tasks of kind ``evaluate`` too, in which it measures the global model after
            the rounds that the job measures. They choose the best model; a script started by hand gets none.

    Raises:
        ConfigurationError: A task was not replied to.
        WorkerError: The server, or another rank, is gone.
    """
    source = TaskSource(model, evaluate=evaluate)
    return _yielded(source)


def _yielded(source: TaskSource) -> Generator[Task]:
    while (task := source.next_task()) is not None:
        try:
            yield task
        except GeneratorExit:  # the script has left its loop, by break or by an exception
            source.leave()
            raise


def _arrays(fd: int | None, framework: str) -> dict[str, dict[str, Array]]:
    """Returns the arrays of a task by role, as this process's own, all in one memory; closes the file descriptor."""
    if fd is None:
        raise WorkerError("the server sent a task without its arrays")
    with TensorFile(fd) as file:
        data = np.empty(file.nbytes, np.uint8)
        file.fill(data, 0)
        header = file.header
    trees: dict[str, dict[str, Array]] = {role: {} for role in ROLES}
    for key, entry in entries_of(header, len(data)).items():
        role, _, name = key.partition("/")
        trees[role][name] = view(data, entry, framework=framework)
    return trees
