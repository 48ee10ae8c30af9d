"""Each client in a process of its own, which gives all of its memory back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from shoal.data import Dataset, Population, Subset
from shoal.devices import Devices, Launched, cores_each
from shoal.engine import ClientResult, ClientTask
from shoal.engines.fork_server import Limits, serve
from shoal.engines.parcels import pack_broadcast, pack_task, unpack_result
from shoal.engines.server_link import ServerLink
from shoal.errors import ClientError, ConfigurationError, EngineError
from shoal.learners.base import Learner
from shoal.processes.forking import ending
from shoal.processes.messages import Message
from shoal.types import Broadcast

START = 120.0
"""Seconds that the server may take to import what training needs."""

GRACE = 60.0
"""Seconds beyond a client's own in which its result must come."""


class ProcessEngine:
    """Trains each client in a child process that ends and gives all its memory back, on the host and on the device.

    The children come from a fork server, which :meth:`open` forks from this process with everything loaded: learner
    and data are inherited, not sent, and may hold anything. What changes in them afterwards, the children do not see.

    Results come in the order of the tasks, so that the cohort's sum has the bits of the sequential engine's. Each
    operation uses one CPU thread for each core that a child has to itself, unless the learner's devices say otherwise.

    Args:
        max_concurrent: Clients that train at once; None for the number of CPU cores that this process may use, or for
            its share of them where a launcher has started several workers on the machine.
        clients_per_process: Clients that a child trains, one after the other, before it ends.
        client_timeout: Seconds that a client may take, before its process is killed.

    Raises:
        ConfigurationError: A number is not positive.
    """

    name = "process"

    def __init__(
        self, max_concurrent: int | None = None, clients_per_process: int = 1, client_timeout: float = 3600.0
    ) -> None:
        if max_concurrent is not None and max_concurrent < 1:
            raise ConfigurationError(
                f"max_concurrent must be at least 1, not {max_concurrent}; None is one for each core"
            )
        if clients_per_process < 1:
            raise ConfigurationError(f"clients_per_process must be at least 1, not {clients_per_process}")
        if not client_timeout > 0:
            raise ConfigurationError(f"client_timeout must be > 0 seconds, not {client_timeout}")
        self.max_concurrent = max_concurrent
        self.clients_per_process = clients_per_process
        self.client_timeout = client_timeout
        self._link: ServerLink | None = None
        self._learner: Learner | None = None
        self._dataset: Dataset | None = None
        self._window = 0
        self._run = 0

    def open(self, learner: Learner, clients: Population) -> None:
        """Forks the server.

        Raises:
            ConfigurationError: The learner cannot be used in a forked process, for instance because CUDA is in use in
                this one.
            EngineError: The server ended, or was not ready in time.
        """
        self.close()
        limits = Limits(
            max_concurrent=self._concurrent(),
            clients_per_process=self.clients_per_process,
            client_timeout=self.client_timeout,
        )
        dataset = clients.dataset.dataset if isinstance(clients.dataset, Subset) else clients.dataset
        ours = learner.on(dataclasses.replace(learner.devices, threads=self.child_threads(learner.devices)))
        link = ServerLink(partial(serve, learner=ours, dataset=dataset, limits=limits, parent=os.getpid()))
        self._link, self._learner, self._dataset = link, learner, dataset
        self._window = 2 * limits.max_concurrent
        try:
            message, _ = link.receive(START)
        except BaseException:
            link.kill()  # it has no children yet, and may take its time to hear of the end
            self.close()
            raise
        if message["kind"] == "refused":
            self.close()
            raise ConfigurationError(f"engine 'process' cannot run here: {message['why']}")

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Yields the results in the order of the tasks.

        When the iterator has ended or was closed, all of the round's processes are gone.

        Raises:
            ConfigurationError: The engine is not open; or it was opened with another learner or other data.
            EngineError: The fork server has ended.
        """
        if self._link is None:
            raise ConfigurationError("engine 'process' is not open: call open(learner, clients) before run(…)")
        if learner is not self._learner:
            raise ConfigurationError("engine 'process' was opened with another learner: open it with this one")
        return self._results(self._link, broadcast, tasks, [self._indices(task) for task in tasks])

    def child_threads(self, devices: Devices) -> int:
        """Returns how many CPU threads one operation of a child uses: the user's number, or its share of the cores."""
        return devices.threads or max(1, _cores() // self._concurrent())

    def close(self) -> None:
        """Ends the server and whatever it has under way."""
        if self._link is not None:
            self._link.stop()
        self._link = self._learner = self._dataset = None
        self._run += 1

    def _concurrent(self) -> int:
        return self.max_concurrent or _cores()

    def _results(
        self, link: ServerLink, broadcast: Broadcast, tasks: Sequence[ClientTask], indices: Sequence[np.ndarray]
    ) -> Iterator[ClientResult]:
        self._run += 1
        run, sent = self._run, 0
        held: dict[int, ClientResult] = {}
        try:
            _hand_over(link, {"kind": "begin", "run": run}, partial(pack_broadcast, broadcast))
            for place in range(len(tasks)):
                self._check(run)
                while sent < min(place + self._window, len(tasks)):
                    pack = partial(pack_task, tasks[sent], indices[sent])
                    _hand_over(link, {"kind": "task", "place": sent}, pack)
                    sent += 1
                while place not in held:
                    message, fd = self._next(link, run, within=self.client_timeout + GRACE)
                    held[message["place"]] = self._result(tasks[message["place"]], message, fd)
                yield held.pop(place)
        finally:
            if link.serving and run == self._run:
                self._end(link, run)

    def _next(self, link: ServerLink, run: int, within: float) -> tuple[Message, int | None]:
        """Returns the server's next message of a round."""
        self._check(run)
        while True:
            message, fd = link.receive(within)
            if message["run"] == run:
                return message, fd
            if fd is not None:
                os.close(fd)

    def _check(self, run: int) -> None:
        if run != self._run:
            raise EngineError("engine 'process' was closed, or began another round, before this one had ended")

    def _end(self, link: ServerLink, run: int) -> None:
        """Ends a round, and waits until its processes are gone."""
        link.send({"kind": "end", "run": run})
        kind = ""
        while kind != "ended":
            message, fd = self._next(link, run, within=GRACE)
            kind = message["kind"]
            if fd is not None:
                os.close(fd)

    def _result(self, task: ClientTask, message: Message, fd: int | None) -> ClientResult:
        """Returns what a message of the server's says of a task."""
        client = task.client
        match message["kind"]:
            case "done" if fd is not None:
                try:
                    return unpack_result(fd, client)
                except ValueError as error:
                    told = f"what client {client} sent cannot be read: {error}"
                finally:
                    os.close(fd)
            case "late":
                told = (
                    f"client {client} took longer than client_timeout={self.client_timeout:g} s and its process was "
                    "killed: raise client_timeout if it needs more"
                )
            case "unborn":
                told = f"no process can be started for client {client}: {message['why']}"
            case _:
                told = f"client {client}'s process {ending(message['code'])}"
        return ClientResult(client=client, error=ClientError(told))

    def _indices(self, task: ClientTask) -> np.ndarray:
        """Returns where a task's samples lie in the data set that the children have."""
        if isinstance(task.data, Subset) and task.data.dataset is self._dataset:
            return task.data.indices
        raise ConfigurationError(
            f"engine 'process' was opened with one data set, and client {task.client} has other data: "
            "make them a Subset of that data set"
        )


def _cores() -> int:
    return cores_each((Launched.here() or Launched.alone()).local_count)


def _hand_over(link: ServerLink, message: Message, pack: Callable[[], int]) -> None:
    """Sends a message with shared memory."""
    try:
        parcel = pack()
    except OSError as error:
        raise EngineError(f"engine 'process' has no memory to share with its children: {error}") from error
    try:
        link.send(message, parcel)
    finally:
        os.close(parcel)
