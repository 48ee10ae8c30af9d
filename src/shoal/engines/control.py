"""How the workers of one run talk: each with the leader, in JSON, and with a deadline on every wait."""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Self

from shoal.errors import WorkerError

BEAT = 2.0
"""Seconds from one sign of life to the next."""

SILENCE = 15.0
"""After so many seconds without a sign of life a worker counts as dead."""

LARGEST = 1 << 28
"""Bytes of the largest message; a longer one is a fault."""

PASSWORD = 32
"""Characters of the password that the leader gives out."""

HELLO = 1 << 12
"""Bytes of the largest message of somebody who has not said the password."""

Message = dict[str, Any]


class Peer:
    """The connection to one other worker.

    Args:
        stream: The connected socket.
        name: What messages call the worker.
    """

    def __init__(self, stream: socket.socket, name: str) -> None:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.settimeout(SILENCE)
        self.name = name
        self.stream = stream
        self.inbox: deque[Message] = deque()
        self.heard = time.monotonic()
        """When the last sign of life came."""
        self.gone = False
        """Whether the connection has ended."""
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Sends a message.

        Raises:
            OSError: The connection has ended, or nothing was taken for :data:`SILENCE` seconds.
        """
        body = json.dumps(message).encode()
        with self._sending:
            self.stream.sendall(struct.pack("!I", len(body)) + body)

    def read(self, largest: int = LARGEST) -> None:
        """Takes in what has arrived; to be called when something has, or the connection has ended."""
        try:
            arrived = self.stream.recv(1 << 16)
        except OSError:
            arrived = b""
        self.gone = not arrived
        self.heard = time.monotonic()
        self._buffer += arrived
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from("!I", self._buffer)
            if length > largest:
                self.gone = True
                return
            if len(self._buffer) < 4 + length:
                return
            try:
                message = json.loads(self._buffer[4 : 4 + length])
            except ValueError:
                self.gone = True
                return
            del self._buffer[: 4 + length]
            if message:  # an empty one is a sign of life and nothing more
                self.inbox.append(message)

    def close(self) -> None:
        """Ends the connection."""
        self.stream.close()


class Control:
    """One worker's connections: the leader's to all others, or another worker's to the leader.

    Whatever ends one worker ends the others: an exception is told, a closed connection is seen at once, and a machine
    that is silent for :data:`SILENCE` seconds is given up.

    Args:
        peers: The connections, by the other worker's rank.
    """

    def __init__(self, peers: Mapping[int, Peer]) -> None:
        self._peers = peers
        self._awake = time.monotonic()
        self._closing = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="shoal-signs-of-life", daemon=True)
        self._beating.start()

    def tell(self, message: Message) -> None:
        """Sends a message to all peers.

        Raises:
            WorkerError: One of them is gone.
        """
        for peer in self._peers.values():
            try:
                peer.send(message)
            except OSError as error:
                self.watch()
                raise WorkerError(f"{peer.name} is gone: {error}") from error

    def try_to_tell(self, message: Message) -> bool:
        """Sends a message to those peers that are there; returns whether all were."""
        told = True
        for peer in self._peers.values():
            try:
                peer.send(message)
            except OSError:
                told = False
        return told

    def gather(self, kind: str) -> dict[int, Any]:
        """Waits for one message of a kind from each peer, for as long as all are alive.

        Returns:
            What the messages hold, by the peer's rank.

        Raises:
            WorkerError: One of them failed or is gone.
            KeyboardInterrupt: One of them was interrupted.
        """
        while not all(peer.inbox for peer in self._peers.values()):
            self._pump(0.5)
        return {rank: _content(peer.inbox.popleft(), kind, peer) for rank, peer in self._peers.items()}

    def watch(self) -> None:
        """Looks whether all peers are alive, without waiting; :meth:`gather` says what is raised."""
        self._pump(0.0)

    def wait_for_all_to_leave(self, seconds: float) -> None:
        """Waits until the peers have closed their connections, at most so long."""
        deadline = time.monotonic() + seconds
        while any(not peer.gone for peer in self._peers.values()) and time.monotonic() < deadline:
            self._read_ready(0.1)

    def close(self) -> None:
        """Ends all connections."""
        self._closing.set()
        self._beating.join(timeout=SILENCE)
        for peer in self._peers.values():
            peer.close()

    def _pump(self, seconds: float) -> None:
        """Reads what has come or comes within some seconds, and raises what it tells of a peer's end."""
        self._read_ready(seconds)
        now = time.monotonic()
        for peer in self._peers.values():
            if peer.inbox:
                _raise_its_end(peer.inbox[0], peer)
            if peer.gone and not peer.inbox:
                raise WorkerError(f"{peer.name} is gone: its process or its machine has ended")
            # Signs of life that came while nobody looked have been read just now, so an old one is the last there was.
            if now - max(peer.heard, self._awake) > SILENCE:
                raise WorkerError(f"{peer.name} is gone: no sign of life for {SILENCE:.0f} seconds")

    def _read_ready(self, seconds: float) -> None:
        open_peers = {peer.stream: peer for peer in self._peers.values() if not peer.gone}
        ready, _, _ = select.select(list(open_peers), [], [], seconds)
        for stream in ready:
            open_peers[stream].read()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(BEAT):
            now = time.monotonic()
            if now - last > 2 * BEAT:  # this process was suspended, and the others perhaps with it
                self._awake = now
            last = now
            self.try_to_tell({})


class Reception:
    """Where the leader takes in the other workers.

    Args:
        host: The leader's machine as the others know it.
        others: How many are to come.
    """

    def __init__(self, host: str, others: int) -> None:
        self.password = secrets.token_hex(PASSWORD // 2)
        """What those who come must know."""
        self._others = others
        self._listener = _listener(host)

    @property
    def port(self) -> int:
        """Where to come to."""
        return int(self._listener.getsockname()[1])

    def receive(self, deadline: float) -> Control:
        """Waits until all have come.

        Args:
            deadline: On the clock of ``time.monotonic``.

        Raises:
            WorkerError: The time is up.
        """
        peers: dict[int, Peer] = {}
        try:
            while len(peers) < self._others:
                peer = self._next(deadline, len(peers))
                if hello := self._checked(peer):
                    peer.name = f"worker {hello['rank']} (process {hello['process']} on {hello['host']})"
                    peers[hello["rank"]] = peer
                else:
                    peer.close()
        except BaseException:
            for peer in peers.values():
                peer.close()
            raise
        return Control(dict(sorted(peers.items())))

    def close(self) -> None:
        """Takes in nobody any more."""
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self, deadline: float, here: int) -> Peer:
        self._listener.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            stream, _ = self._listener.accept()
        except TimeoutError as error:
            raise WorkerError(f"of {self._others + 1} workers only {here + 1} came in time") from error
        return Peer(stream, "somebody")

    def _checked(self, peer: Peer) -> Message | None:
        """Returns what somebody tells of itself; None if it does not know the password."""
        while not peer.inbox and not peer.gone and select.select([peer.stream], [], [], SILENCE)[0]:
            peer.read(HELLO)
        hello = peer.inbox.popleft() if peer.inbox else {}
        return hello if secrets.compare_digest(str(hello.get("password", "")), self.password) else None


def call_on(host: str, port: int, password: str, rank: int, deadline: float) -> Control:
    """Connects with the leader.

    Args:
        host: The leader's machine.
        port: Its reception's.
        password: Its reception's too.
        rank: This worker's.
        deadline: On the clock of ``time.monotonic``.

    Raises:
        WorkerError: The leader cannot be reached in time.
    """
    try:
        stream = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.01))
    except OSError as error:
        raise WorkerError(f"worker 0 cannot be reached at {host}:{port}: {error}") from error
    peer = Peer(stream, f"worker 0 (on {host})")
    peer.send({"password": password, "rank": rank, "process": os.getpid(), "host": socket.gethostname()})
    return Control({0: peer})


def _listener(host: str) -> socket.socket:
    """Returns a socket that listens on the address of ``host``, or on all where that is no address of this machine."""
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family)
    except OSError:
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)


def _content(message: Message, kind: str, peer: Peer) -> Any:
    _raise_its_end(message, peer)
    if kind not in message:
        raise WorkerError(f"{peer.name} said {', '.join(message)} where {kind} was due: do all run the same shoal?")
    return message[kind]


def _raise_its_end(message: Message, peer: Peer) -> None:
    """Raises what a message tells of its sender's end."""
    if "ended" not in message:
        return
    account = message["ended"]
    if account["interrupted"]:
        raise KeyboardInterrupt(f"{peer.name} was interrupted")
    error = WorkerError(f"{peer.name} failed: {account['error']}", told_by_leader=account["leader"])
    if account["traceback"]:
        error.add_note(account["traceback"])
    raise error
