"""One rank's connection with the server: signs of life, and what is to be done next."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import ConfigurationError, WorkerError
from shoal.processes.messages import Message, receive, send
from shoal.sites.address import ATTEMPT, NAME, Address
from shoal.sites.connection import LEFT

BEAT = 1.0
"""Seconds from one sign of life to the next."""

CONNECT = 30.0
"""Seconds in which the server must answer."""

PACKAGE, LIBRARY = str(Path(__file__).parents[1]), str(Path(os.__file__).parent)
"""Where code lies that is not the user's."""

GRACE = 5.0
"""Seconds that a rank has to end after the server is gone."""


class Link:
    """The connection. A thread of its own keeps it alive and listens, so that a rank at its work is not taken for dead.

    Args:
        address: The server's.
        rank: This process's.
        ranks: How many its site has.

    Raises:
        WorkerError: The server cannot be reached, or does not want this process.
    """

    def __init__(self, address: Address, rank: int, ranks: int) -> None:
        self.site = os.environ[NAME]
        self.rank = rank
        self.ranks = ranks
        self._orders: queue.SimpleQueue[tuple[Message, int | None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._doing = "starting"
        self._over = False
        try:
            self._stream = address.call(CONNECT)
        except OSError as error:
            raise WorkerError(f"the federation's server cannot be reached: {error}") from error
        attempt = int(os.environ.get(ATTEMPT, "0"))
        hello = {"key": address.key, "site": self.site, "attempt": attempt, "rank": rank, "ranks": ranks}
        try:
            send(self._stream, hello)
            received = receive(self._stream)
        except OSError as error:
            raise WorkerError(f"the federation's server did not answer: {error}") from error
        if received is None:
            raise WorkerError("the federation's server does not know this process: let the site's launcher start it")
        self.welcome: Mapping[str, Any] = received[0]["welcome"]
        """What the server says to all ranks: the site's settings."""
        self._stream.settimeout(None)
        for target in (self._listen, self._live):
            threading.Thread(target=target, name="shoal-link", daemon=True).start()

    def do(self, what: str, **more: Any) -> None:
        """Tells the server what this rank begins to do."""
        self._doing = what
        self._say({"doing": what, **more})

    def next_order(self) -> tuple[Message, int | None]:
        """Waits for what the server wants of this rank; the site's launcher ends a rank that the server has given up.

        Returns:
            ``{"task": …}`` or ``{"end": …}``, and a file descriptor for the caller to close: that of the arrays.

        Raises:
            WorkerError: The server is gone.
        """
        order = self._orders.get()
        if order is None:
            raise WorkerError(f"the federation's server is gone; rank {self.rank} of {self.site} ends")
        return order

    def reply(self, told: Mapping[str, Any], fd: int | None) -> None:
        """Sends the answer to a task; the caller keeps the file descriptor.

        Raises:
            WorkerError: The server is gone.
        """
        if not self._say({"reply": dict(told)}, fd):
            raise WorkerError(f"the federation's server is gone; the reply of {self.site} cannot be sent")

    def leave(self, *, early: bool) -> None:
        """Parts from the server.

        Args:
            early: Whether before the federation's end.
        """
        if early and not self._over:
            self.do(LEFT)
        self._over = True

    def _say(self, message: Message, fd: int | None = None) -> bool:
        """Sends a message; returns whether the server takes it."""
        try:
            with self._lock:
                send(self._stream, message, fd)
        except ValueError as error:
            raise ConfigurationError(f"metrics and settings must be small: {error}") from error
        except OSError:
            return False
        return True

    def _live(self) -> None:
        waiting = threading.Event()
        while not waiting.wait(BEAT) and self._say({"doing": self._doing}):
            pass

    def _listen(self) -> None:
        while True:
            try:
                received = receive(self._stream)
            except (OSError, ValueError):
                received = None
            if received is not None and "where" in received[0]:
                self._say({"where": _whereabouts()})
                continue
            self._orders.put(received)
            if received is None:
                break
            if "end" in received[0]:
                self._over = True
        if not self._over:
            self._end_process()

    def _end_process(self) -> None:
        """Ends a rank whose server is gone, whatever it is in: an exchange with other ranks may wait for ever."""
        threading.Event().wait(GRACE)
        with contextlib.suppress(OSError):
            sys.stderr.write(f"shoal: the federation's server is gone; rank {self.rank} of {self.site} ends\n")
            sys.stderr.flush()
        os._exit(1)


def _whereabouts() -> str:
    """Returns the line of the user's own code at which the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - there is no other way
    first, own = frame, None
    while frame is not None and own is None:
        path = frame.f_code.co_filename
        own = None if "site-packages" in path or path.startswith((PACKAGE, LIBRARY, "<")) else frame
        frame = frame.f_back
    found = own or first
    if found is None:
        return ""
    name = Path(found.f_code.co_filename).name
    return f"{name}:{found.f_lineno} in {found.f_code.co_name}"


_link: list[Link] = []
"""This process's connection: one, or none yet."""


def connected() -> Link | None:
    """Returns this process's connection, made at the first call; None outside of a federation.

    Raises:
        ConfigurationError: The federation that started this script is over.
        WorkerError: The server cannot be reached.
    """
    if not _link:
        address = Address.here()
        if address is None:
            return None
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        _link.append(Link(address, rank, ranks))
    return _link[0]
