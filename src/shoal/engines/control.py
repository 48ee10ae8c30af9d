"""How the workers of one run talk: each with the leader, in JSON, with a sign of life every few seconds."""

from __future__ import annotations

import ipaddress
import json
import selectors
import signal
import socket
import struct
import threading
import time
from collections import deque
from types import FrameType
from typing import Any

from shoal.engines.accounts import end_of
from shoal.errors import WorkerError

BEAT = 2.0
"""Seconds from one sign of life to the next."""

SILENCE = 15.0
"""After so many seconds without a sign of life, or without taking what it is sent, a worker counts as dead."""

LARGEST = 1 << 28
"""Bytes of the largest message; a longer one is a fault."""

NOTICE = 2.0
"""Seconds in which a worker should notice by itself that another has ended; then the alarm goes."""

ALARM = signal.SIGURG
"""The signal that interrupts the main thread; by default the system ignores it, and nothing else uses it."""

NEVER = float("inf")

Message = dict[str, Any]


def frame(message: Message) -> bytes:
    """Returns a message as it is sent: its length and its JSON."""
    body = json.dumps(message).encode()
    return struct.pack("!I", len(body)) + body


SIGN_OF_LIFE = struct.pack("!I", 0)
"""What is sent every :data:`BEAT` seconds: a message of length 0."""


class Peer:
    """The connection to one other worker. It never waits.

    Args:
        stream: The connected socket.
        name: What messages call the worker.
        largest: Bytes of the largest message to take.
    """

    def __init__(self, stream: socket.socket, name: str, largest: int = LARGEST) -> None:
        stream.setblocking(False)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.name = name
        self.largest = largest
        self.stream = stream
        self.inbox: deque[Message] = deque()
        self.gone = False
        """Whether the connection has ended."""
        self.told = False
        """Whether the worker has told of its end, so that that of its connection is no news."""
        self.heard = self.taken = time.monotonic()
        """When the last sign of life came, and when the other end last took what it was sent."""
        self._incoming = bytearray()
        self._outgoing = bytearray()

    @property
    def waiting(self) -> bool:
        """Whether something is yet to be sent."""
        return bool(self._outgoing)

    def post(self, message: bytes) -> None:
        """Sends a framed message, or as much of it as the connection takes; :meth:`write` sends the rest."""
        if not self._outgoing:
            self.taken = time.monotonic()
        self._outgoing += message
        self.write()

    def write(self) -> None:
        """Sends what waits, as far as the connection takes it."""
        try:
            while self._outgoing and not self.gone:
                sent = self.stream.send(self._outgoing)
                del self._outgoing[:sent]
                self.taken = time.monotonic()
        except BlockingIOError:
            return
        except OSError:  # the connection has ended; what came before its end is yet to be read
            self._outgoing.clear()

    def read(self) -> None:
        """Takes in what has arrived; to be called when something has, or the connection has ended."""
        try:
            arrived = self.stream.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            arrived = b""
        self.gone = not arrived
        self.heard = time.monotonic()
        self._incoming += arrived
        while len(self._incoming) >= 4 and not self.gone:
            (length,) = struct.unpack_from("!I", self._incoming)
            if length > self.largest:
                self.gone = True
            elif len(self._incoming) < 4 + length:
                return
            elif length:
                self._unpack(length)
            del self._incoming[: 4 + length]

    def close(self) -> None:
        """Ends the connection."""
        self.stream.close()

    def _unpack(self, length: int) -> None:
        try:
            message = json.loads(self._incoming[4 : 4 + length])
        except (ValueError, RecursionError):
            message = None
        if isinstance(message, dict):
            self.inbox.append(message)
        else:  # nothing that follows can be trusted
            self.gone = True


class Control:
    """One worker's connections: the leader's to all others, or another worker's to the leader.

    A thread of its own sends the signs of life and reads, so that a worker at its work is neither taken for dead nor
    deaf. Whatever ends one worker ends the others: an exception is told, a closed connection is seen at once, and a
    machine that is silent for :data:`SILENCE` seconds is given up.
    """

    def __init__(self) -> None:
        self.end: BaseException | None = None
        """What a peer's end means here, as an exception; None while all are well."""
        self.told_by: int | None = None
        """The rank of the peer that told of it; None where it is gone without a word."""
        self._peers: dict[int, Peer] = {}
        self._alarm_due = NEVER
        self._armed = False
        self._handler: Any = signal.SIG_DFL
        self._changed = threading.Condition()  # guards all of the above, and wakes who waits for a change of it
        self._closing = False
        self._woken, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._attend, name="shoal-control", daemon=True)
        self._thread.start()

    def admit(self, rank: int, peer: Peer) -> None:
        """Takes in another worker."""
        with self._changed:
            self._peers[rank] = peer
        self._waker.send(b".")

    @property
    def ranks(self) -> set[int]:
        """The workers that have been taken in."""
        return set(self._peers)

    def tell(self, message: Message) -> None:
        """Sends a message to all peers that are there; it does not wait for them to take it."""
        framed = frame(message)
        with self._changed:
            for peer in self._peers.values():
                peer.post(framed)
            rest = any(peer.waiting for peer in self._peers.values())
        if rest:
            self._waker.send(b".")

    def gather(self, kind: str) -> dict[int, Any]:
        """Waits for one message of a kind from each peer, for as long as all are alive.

        Returns:
            What the messages hold, by the peer's rank.

        Raises:
            WorkerError: One of them failed or is gone.
            ConfigurationError: One of them cannot do what was asked for.
            KeyboardInterrupt: One of them was interrupted.
        """
        with self._changed:
            # An end is no message to who waits, though it may have been read and not yet judged.
            while not all(peer.inbox and not _tells_of_its_end(peer) for peer in self._peers.values()):
                self._raise_end()
                self._changed.wait(1.0)
            return {rank: _content(peer, kind) for rank, peer in sorted(self._peers.items())}

    def watch(self) -> None:
        """Looks whether all peers are alive, without waiting; :meth:`gather` says what is raised."""
        with self._changed:
            self._raise_end()

    def cause(self, error: BaseException, seconds: float) -> BaseException:
        """Returns what is behind an exception of this worker: of an interruption perhaps another worker's end.

        Launchers end all workers when one has ended, and so the first thing that reaches this one may be a signal.

        Args:
            error: This worker's exception.
            seconds: How long to wait for the news.
        """
        if isinstance(error, KeyboardInterrupt):
            with self._changed:
                self._changed.wait_for(lambda: isinstance(self.end, Exception), seconds)
                return self.end if isinstance(self.end, Exception) else error
        return error

    def wait_for_an_end(self, seconds: float) -> None:
        """Waits until a peer has told of its end or is gone, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self.end is not None, seconds)

    def wait_for_all_to_leave(self, seconds: float) -> None:
        """Waits until the peers have closed their connections, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: all(peer.gone for peer in self._peers.values()), seconds)

    def arm(self) -> None:
        """Sets the alarm: if a worker ends, and this one does not notice, its main thread is interrupted at its work.

        The interruption is a ``KeyboardInterrupt``, which no client's training takes for its own failure. Outside the
        main thread, where Python handles no signals, it does nothing.
        """
        if not self._armed and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(ALARM, self._interrupt)
            self._armed = True

    def disarm(self) -> None:
        """Takes the alarm back."""
        if self._armed:
            self._armed = False
            signal.signal(ALARM, self._handler)

    def address(self) -> str:
        """Returns this machine's address as the others know it; a loopback address where all are on this machine."""
        own = [str(peer.stream.getsockname()[0]).removeprefix("::ffff:") for peer in self._peers.values()]
        return next((address for address in own if not is_loopback(address)), "127.0.0.1")

    def close(self) -> None:
        """Ends all connections; without effect where that is done."""
        if self._closing:
            return
        self._closing = True
        self._waker.send(b".")
        self._thread.join(SILENCE)
        for peer in self._peers.values():
            peer.close()
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def _raise_end(self) -> None:
        if self.end is not None:
            self._alarm_due = NEVER  # it is noticed
            raise self.end

    def _interrupt(self, _signum: int, _frame: FrameType | None) -> None:
        end = self.end
        if self._armed and end is not None:
            raise end if isinstance(end, KeyboardInterrupt) else KeyboardInterrupt(str(end))

    def _attend(self) -> None:
        """Is the thread: exchanges what there is, and judges who is alive."""
        looked = beaten = time.monotonic()
        while not self._closing:
            self._exchange(BEAT / 4)
            now = time.monotonic()
            with self._changed:
                if now - looked > 2 * BEAT:  # this process was suspended, and the others perhaps with it
                    for peer in self._peers.values():
                        peer.heard = peer.taken = now
                looked = now
                if now - beaten >= BEAT:
                    beaten = now
                    self._live()
                self._judge(now)
                if self._armed and now >= self._alarm_due:
                    self._alarm_due = now + 2 * NOTICE
                    signal.pthread_kill(threading.main_thread().ident or 0, ALARM)

    def _exchange(self, seconds: float) -> None:
        """Reads and sends what can be, and waits for that at most so long."""
        with self._changed:
            for peer in self._peers.values():
                _attune(self._selector, peer)
        for key, events in self._selector.select(seconds):
            with self._changed:
                if key.data is None:
                    self._woken.recv(1 << 12)
                else:
                    _serve(key.data, events)

    def _live(self) -> None:
        for peer in self._peers.values():
            if not peer.waiting:  # else that is sign of life enough
                peer.post(SIGN_OF_LIFE)

    def _judge(self, now: float) -> None:
        """Takes note of the ends of peers, and wakes who waits for news."""
        for rank, peer in self._peers.items():
            if _tells_of_its_end(peer):
                peer.told = True
                self._note(end_of(peer.name, peer.inbox.pop()["ended"]), rank)
            elif not peer.told and (why := _sign_of_death(peer, now)):
                peer.gone = True
                self._note(WorkerError(f"{peer.name} is gone: {why}"))
        self._changed.notify_all()

    def _note(self, end: BaseException, told_by: int | None = None) -> None:
        """Takes note of the end of a peer; of several the first counts."""
        if self.end is None:
            self._alarm_due = time.monotonic() + NOTICE
        elif isinstance(self.end, Exception) or told_by is not None:  # a launcher interrupts all when one is gone
            return
        self.end, self.told_by = end, told_by


def _sign_of_death(peer: Peer, now: float) -> str | None:
    if peer.gone:
        return "its process or its machine has ended"
    if now - peer.heard > SILENCE:
        return f"no sign of life for {SILENCE:.0f} seconds"
    if peer.waiting and now - peer.taken > SILENCE:
        return f"it has read nothing for {SILENCE:.0f} seconds"
    return None


def is_loopback(address: str) -> bool:
    """Tells whether an IP address means, on every machine, that machine itself."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _attune(selector: selectors.BaseSelector, peer: Peer) -> None:
    """Has a selector wait for what there is to do with a peer."""
    known = selector.get_map().get(peer.stream)
    wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.waiting else 0)
    if peer.gone:
        if known:
            selector.unregister(peer.stream)
    elif known is None:
        selector.register(peer.stream, wanted, peer)
    elif known.events != wanted:
        selector.modify(peer.stream, wanted, peer)


def _serve(peer: Peer, events: int) -> None:
    if events & selectors.EVENT_WRITE:
        peer.write()
    if events & selectors.EVENT_READ:
        peer.read()


def _tells_of_its_end(peer: Peer) -> bool:
    return bool(peer.inbox) and "ended" in peer.inbox[-1]


def _content(peer: Peer, kind: str) -> Any:
    message = peer.inbox.popleft()
    if kind not in message:
        raise WorkerError(f"{peer.name} said {', '.join(message)} where {kind} was due: do all run the same shoal?")
    return message[kind]
