"""The fork server: a process that has everything loaded, and forks one after the other those that clients train in."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shoal.data import Dataset
from shoal.engine import ClientResult
from shoal.engines.parcels import in_words, pack_result, unpack_broadcast, unpack_task
from shoal.engines.sequential import attempt
from shoal.errors import ConfigurationError
from shoal.learners.base import Learner
from shoal.processes.forking import LOOK, die_with, flush_output, fork, in_new_thread
from shoal.processes.messages import Message, channel, receive, send
from shoal.types import Broadcast

LEAVE = 10.0
"""Seconds that a child may take to end after its last client."""

MOST_TOLD = 4000
"""Characters of an error that fit into a message."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many children there are, and for how long."""

    max_concurrent: int
    """Children at once."""
    clients_per_process: int
    """Clients that a child trains before it ends."""
    client_timeout: float
    """Seconds that a client may take."""


@dataclass(kw_only=True, eq=False)
class _Child:
    """A process that trains clients, as the server sees it."""

    pid: int
    channel: socket.socket
    clients_left: int
    """How many clients it may still be given."""
    place: int | None = None
    """Which task it is at."""
    deadline: float = math.inf
    """When it is to be killed."""
    late: bool = False
    """Whether its client took too long."""
    silent: bool = False
    """Whether it has closed its end of the channel."""

    def kill(self) -> None:
        """Kills it, and what its clients have started; before it is waited for, while the number is its own."""
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)


def serve(end: socket.socket, learner: Learner, dataset: Dataset, limits: Limits, parent: int) -> None:
    """Is the server's process: makes ready, says so, and serves until it is told to stop or its parent is gone.

    Args:
        end: The channel to the parent.
        learner: Trains the clients.
        dataset: All clients' samples.
        limits: How many children there may be.
        parent: The parent's process id.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as with SIGINT, the parent decides, and this process goes with it
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a child that asked the terminal for input would be stopped
    os.close(nothing)

    def look() -> None:
        if os.getppid() != parent:
            os._exit(0)

    try:
        in_new_thread(learner.preload, look)
    except Exception as error:
        why = str(error) if isinstance(error, ConfigurationError) else in_words(error)
        send(end, {"kind": "refused", "why": why[:MOST_TOLD]})
        return
    gc.freeze()  # or each child's collector would write to, and so copy, all of the memory that they share
    send(end, {"kind": "ready"})
    ForkServer(end, learner, dataset, limits, look).serve()


class ForkServer:
    """Gives the tasks of a round to children, and tells the parent what came of each.

    What it is told: ``begin`` a round, with the broadcast; a ``task``, with its place in the round; ``end`` the round,
    whatever is under way; ``stop``. What it tells of a task: ``done``, with the result; ``died``; ``late``;
    ``unborn``, where no process could be started. And that the round has ``ended``, when all children are gone.
    """

    def __init__(
        self, end: socket.socket, learner: Learner, dataset: Dataset, limits: Limits, look: Callable[[], None]
    ) -> None:
        self._end = end
        self._learner = learner
        self._dataset = dataset
        self._limits = limits
        self._look = look
        self._serving = True
        self._run = 0
        self._ending = False
        self._broadcast: int | None = None
        self._queue: deque[tuple[int, int]] = deque()
        self._outbox: deque[tuple[Message, int | None]] = deque()
        self._children: list[_Child] = []
        self._woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler there must be, for its byte to be written
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        end.setblocking(False)

    def serve(self) -> None:
        """Serves until it is told to stop, or the parent is gone."""
        while self._serving or self._children:
            self._wait()
            self._look()
            if self._serving:
                self._listen()
            for child in self._children:
                self._hear(child)
            self._bury()
            self._kill_late()
            self._assign()
            self._speak()

    def _wait(self) -> None:
        """Sleeps until there is something to do, a second at most."""
        with selectors.PollSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            if self._serving:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)
                selector.register(self._end, wanted)
            for child in self._children:
                if child.place is not None and not child.silent:
                    selector.register(child.channel, selectors.EVENT_READ)
            nearest = min((child.deadline for child in self._children), default=math.inf)
            selector.select(max(0.0, min(LOOK, nearest - time.monotonic())))
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)

    def _listen(self) -> None:
        """Does what the parent asks."""
        while self._serving:
            try:
                received = receive(self._end)
            except BlockingIOError:
                return
            message, fd = received or ({"kind": "stop"}, None)
            match message["kind"]:
                case "begin":
                    self._kill_all()
                    self._run, self._broadcast = message["run"], fd
                case "task" if fd is not None:
                    self._queue.append((message["place"], fd))
                case "end":
                    self._kill_all()
                    self._run, self._ending = message["run"], True
                case _:
                    self._kill_all()
                    self._serving = False

    def _tell(self, kind: str, place: int | None = None, fd: int | None = None, **more: object) -> None:
        self._outbox.append(({"kind": kind, "run": self._run, "place": place, **more}, fd))

    def _speak(self) -> None:
        """Sends as much as the parent's buffer takes."""
        if self._ending and not self._children:
            self._ending = False
            self._tell("ended")
        while self._outbox and self._serving:
            message, parcel = self._outbox[0]
            try:
                send(self._end, message, parcel)
            except BlockingIOError:
                return
            except OSError:  # it is gone, as reading will show
                self._kill_all()
                self._serving = False
                return
            self._outbox.popleft()
            if parcel is not None:
                os.close(parcel)

    def _hear(self, child: _Child) -> None:
        """Takes the results that a child has sent."""
        while child.place is not None and not child.silent:
            try:
                received = receive(child.channel)
            except BlockingIOError:
                return
            if received is None:
                child.silent = True
                return
            self._tell("done", child.place, received[1])
            child.place = None
            child.deadline = math.inf if child.clients_left else time.monotonic() + LEAVE

    def _bury(self) -> None:
        """Takes leave of the children that have ended."""
        for child in [*self._children]:
            if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            self._hear(child)
            child.kill()  # that is, what it has left behind
            _, status = os.waitpid(child.pid, 0)
            self._children.remove(child)
            child.channel.close()
            if child.place is not None and child.late:
                self._tell("late", child.place)
            elif child.place is not None:
                self._tell("died", child.place, code=os.waitstatus_to_exitcode(status))

    def _kill_late(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.deadline <= now:
                child.late, child.deadline = True, math.inf
                child.kill()

    def _kill_all(self) -> None:
        """Ends what there is of a round; nothing is told of it any more."""
        for _, fd in self._queue:
            os.close(fd)
        self._queue.clear()
        for _, parcel in self._outbox:
            if parcel is not None:
                os.close(parcel)
        self._outbox.clear()
        for child in self._children:
            child.place, child.clients_left = None, 0
            child.kill()
        if self._broadcast is not None:
            os.close(self._broadcast)
            self._broadcast = None

    def _assign(self) -> None:
        """Gives tasks to children that have none, or to new ones."""
        while self._queue:
            place, parcel = self._queue[0]
            idle = next((child for child in self._children if child.place is None and child.clients_left), None)
            if idle is None and len(self._children) >= self._limits.max_concurrent:
                return
            try:
                child = idle or self._born()
            except OSError as error:
                if self._children:
                    return  # it may go when one of these has ended
                self._tell("unborn", place, why=str(error))
            else:
                child.clients_left -= 1
                try:
                    send(child.channel, {"place": place}, parcel)
                except OSError:  # it has died meanwhile, with no client
                    child.clients_left = 0
                    continue
                child.place, child.deadline = place, time.monotonic() + self._limits.client_timeout
            self._queue.popleft()
            os.close(parcel)

    def _born(self) -> _Child:
        ours, theirs = channel()
        server = os.getpid()

        def body() -> None:
            os.setpgid(0, 0)
            die_with(server)
            ours.close()
            self._end.close()
            for sibling in self._children:
                sibling.channel.close()
            in_new_thread(lambda: self._train(theirs))

        try:
            pid = fork(body)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        with contextlib.suppress(ProcessLookupError):
            os.setpgid(pid, pid)  # whoever comes first, so that it can be killed with all that it starts
        ours.setblocking(False)
        child = _Child(pid=pid, channel=ours, clients_left=self._limits.clients_per_process)
        self._children.append(child)
        return child

    def _train(self, end: socket.socket) -> None:
        """Is the child: trains the clients that it is given."""
        broadcast: Broadcast | None = None
        for _ in range(self._limits.clients_per_process):
            _, parcel = receive(end) or ({}, None)
            if parcel is None or self._broadcast is None:
                return
            task = unpack_task(parcel, self._dataset)
            os.close(parcel)
            try:
                broadcast = broadcast or unpack_broadcast(self._broadcast)
                result = pack_result(attempt(self._learner, broadcast, task))
            except Exception as error:  # of what is sent, not of the client's training
                result = pack_result(ClientResult(client=task.client, error=error))
            flush_output()
            send(end, {}, result)
            os.close(result)
