"""The server's end of a connection with one process of a site. It never waits."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from shoal.processes.messages import Message, receive, send
from shoal.processes.table import credentials, handle, kill

LEFT = "left"
"""What a rank does that takes no more tasks."""


class Connection:
    """A process that has connected.

    Args:
        stream: The connected socket.

    Raises:
        OSError: It is gone already.
    """

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self.stream = stream
        self.pid, self.user = credentials(stream)
        """Who it is, as the system says."""
        self.site = ""
        """Whose it is; empty while it has not said so."""
        self.heard = time.monotonic()
        """When it last said something."""
        self.doing = "starting"
        """What it last said that it does."""
        self.changed = self.heard
        """When it began to do that, or the connection ended."""
        self.where = ""
        """At which line of its script it said that it is; empty while it was not asked."""
        self.gone = False
        """Whether the connection has ended."""
        self._process = handle(self.pid)
        self._unsent: deque[tuple[Message, int | None]] = deque()

    def post(self, message: Mapping[str, Any], fd: int | None = None) -> None:
        """Sends a message, now or when the other end takes it.

        Args:
            message: As JSON.
            fd: A file descriptor to go along; the caller keeps its own.
        """
        self._unsent.append((dict(message), None if fd is None else os.dup(fd)))
        self.flush()

    def does(self, what: str) -> None:
        """Takes note of what the process says that it does."""
        if self.doing not in (what, LEFT):
            self.doing, self.changed = what, time.monotonic()

    def flush(self) -> None:
        """Sends what waits, as far as the other end takes it."""
        while self._unsent and not self.gone:
            message, fd = self._unsent[0]
            try:
                send(self.stream, message, fd)
            except BlockingIOError:
                return
            except OSError:  # the other end is closed; what it said before is yet to be read
                self._drop_unsent()
                return
            self._unsent.popleft()
            if fd is not None:
                os.close(fd)

    def read(self) -> tuple[Message, int | None] | None:
        """Returns the next message that has arrived, and its file descriptor; None where there is none.

        Raises:
            ValueError: It is no message.
        """
        try:
            received = receive(self.stream)
        except BlockingIOError:
            return None
        except OSError:
            received = None
        if received is None:
            self.gone, self.changed = True, time.monotonic()
            return None
        self.heard = time.monotonic()
        return received

    @property
    def over(self) -> bool:
        """Whether the process has ended, though a child of its own may yet hold the connection."""
        if self._process is None:
            return True
        return bool(select.select([self._process], [], [], 0)[0])

    def kill(self) -> None:
        """Ends the process, at once."""
        if self._process is not None:
            kill(self._process)

    def close(self) -> None:
        """Ends the connection."""
        self.gone = True
        self._drop_unsent()
        self.stream.close()
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.close(self._process)
            self._process = None

    def _drop_unsent(self) -> None:
        for _, fd in self._unsent:
            if fd is not None:
                os.close(fd)
        self._unsent.clear()
