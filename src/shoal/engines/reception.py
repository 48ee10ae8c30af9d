"""How the leader takes in the other workers, and nobody else."""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import time
from typing import Self

from shoal.engines.control import LARGEST, Control, Message, Peer, frame, is_loopback
from shoal.errors import WorkerError

HELLO = 1 << 12
"""Bytes of the largest message of somebody who has not said the password."""

PATIENCE = 5.0
"""Seconds in which somebody who has connected must have said it."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What a machine calls itself where all workers are on it."""

CROWD = 256
"""So many may be connected who have not said it yet."""


class Reception:
    """Where the leader takes in the other workers.

    Args:
        host: The leader's machine as the others know it.
        others: How many are to come.
    """

    def __init__(self, host: str, others: int) -> None:
        self.password = secrets.token_hex(16)
        """What those who come must know."""
        self._others = others
        self._strangers: dict[Peer, float] = {}
        self._listener = _listener(host)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    @property
    def port(self) -> int:
        """Where to come to."""
        return int(self._listener.getsockname()[1])

    def receive(self, control: Control, deadline: float) -> None:
        """Waits until all have come.

        Args:
            control: Whom those who come are brought to.
            deadline: On the clock of ``time.monotonic``.

        Raises:
            WorkerError: The time is up, one of those who have come has ended, or two have the same rank.
        """
        while missing := set(range(1, self._others + 1)) - control.ranks:
            now = time.monotonic()
            if control.end is not None:  # those who come in the next moments are to hear of it
                deadline = min(deadline, now + PATIENCE)
            if now > deadline:
                control.watch()
                who = ", ".join(map(str, sorted(missing)[:8]))
                raise WorkerError(f"of {self._others + 1} workers {len(missing)} did not come in time: {who}")
            for stranger in [stranger for stranger, until in self._strangers.items() if now > until]:
                self._dismiss(stranger)
            for key, _ in self._selector.select(0.5):
                if key.data is None:
                    self._welcome()
                else:
                    self._listen(key.data, control)

    def close(self) -> None:
        """Takes in nobody any more."""
        for stranger in list(self._strangers):
            self._dismiss(stranger)
        self._selector.close()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _welcome(self) -> None:
        try:
            stream, _ = self._listener.accept()
        except OSError:  # who came has gone again
            return
        if len(self._strangers) >= CROWD:
            self._dismiss(next(iter(self._strangers)))
        stranger = Peer(stream, "somebody", HELLO)
        self._strangers[stranger] = time.monotonic() + PATIENCE
        self._selector.register(stream, selectors.EVENT_READ, stranger)

    def _dismiss(self, stranger: Peer) -> None:
        self._forget(stranger)
        stranger.close()

    def _forget(self, stranger: Peer) -> None:
        del self._strangers[stranger]
        self._selector.unregister(stranger.stream)

    def _listen(self, stranger: Peer, control: Control) -> None:
        """Takes in what somebody says, and takes in who knows the password."""
        if stranger not in self._strangers:  # dismissed a moment ago
            return
        stranger.read()
        if not stranger.inbox and not stranger.gone:
            return
        hello = stranger.inbox.popleft() if stranger.inbox else {}
        if not self._knows(hello):
            self._dismiss(stranger)
            return
        self._forget(stranger)
        rank = hello["rank"]
        if rank in control.ranks or not 0 < rank <= self._others:
            stranger.close()
            raise WorkerError(
                f"two workers came as worker {rank}, or there is no such worker: start each with its own RANK"
            )
        stranger.name, stranger.largest = _name(rank, hello), LARGEST
        control.admit(rank, stranger)

    def _knows(self, hello: Message) -> bool:
        said = str(hello.get("password", "")).encode(errors="replace")
        return secrets.compare_digest(said, self.password.encode())


def introduction() -> Message:
    """Returns what a worker tells of itself."""
    return {"process": os.getpid(), "host": socket.gethostname()}


def call_on(where: Message, address: str, rank: int, deadline: float) -> Control:
    """Connects with the leader.

    Args:
        where: The ``port`` and ``password`` of its reception, and its :func:`introduction`.
        address: The leader's machine.
        rank: This worker's.
        deadline: On the clock of ``time.monotonic``.

    Raises:
        WorkerError: The leader cannot be reached in time.
    """
    port = where["port"]
    try:
        stream = socket.create_connection((address, port), timeout=max(deadline - time.monotonic(), 0.01))
    except OSError as error:
        raise WorkerError(f"worker 0 cannot be reached at {address}:{port}: {error}") from error
    peer = Peer(stream, _name(0, where))
    peer.post(frame({"password": where["password"], "rank": rank, **introduction()}))
    control = Control()
    control.admit(0, peer)
    return control


def _name(rank: int, hello: Message) -> str:
    return f"worker {rank} (process {hello['process']} on {hello['host']})"


def _listener(host: str) -> socket.socket:
    """Returns a socket that listens on the address of ``host``, or on all where the others know it by another."""
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        # A machine's own name may mean, on that machine alone, an address such as 127.0.1.1.
        if host in LOOPBACK or not is_loopback(str(address[0])):
            return socket.create_server((host, 0), family=family, backlog=CROWD)
    except OSError:  # it is the address of a router that passes on what comes to it
        pass
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=CROWD)
