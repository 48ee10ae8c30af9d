"""The parent's side of the fork server: starts it, talks to it, and ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable

from shoal.errors import EngineError
from shoal.processes.forking import LOOK, ending, fork
from shoal.processes.messages import Message, channel, receive, send

PATIENCE = 10.0
"""Seconds that the server may take to end, or to read a message."""


class ServerLink:
    """A fork server that this process has started.

    Args:
        serve: Is the server's process; it is given its end of the channel.

    Raises:
        EngineError: No process can be started.
    """

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._end, theirs = channel()
        self._owner = os.getpid()
        self._code: int | None = None

        def body() -> None:
            self._end.close()
            serve(theirs)

        try:
            self._pid = fork(body)
        except OSError as error:
            self._end.close()
            raise EngineError(f"the fork server of engine 'process' cannot be started: {error}") from error
        finally:
            theirs.close()

    @property
    def serving(self) -> bool:
        """Whether the server is this process's own, and is not known to have ended."""
        return self._code is None and os.getpid() == self._owner

    def send(self, message: Message, fd: int | None = None) -> None:
        """Sends a message.

        Raises:
            EngineError: The server is gone, or does not read.
        """
        self._end.settimeout(PATIENCE)
        try:
            send(self._end, message, fd)
        except TimeoutError as error:
            raise self._stuck(PATIENCE) from error
        except OSError as error:
            raise self._lost() from error

    def receive(self, within: float) -> tuple[Message, int | None]:
        """Waits for a message.

        Args:
            within: Seconds.

        Raises:
            EngineError: The server is gone, or said nothing.
        """
        until = time.monotonic() + within
        while (left := until - time.monotonic()) > 0:
            self._end.settimeout(min(LOOK, left))
            try:
                received = receive(self._end)
            except TimeoutError:
                if self._ended() is None:
                    continue
                received = None
            if received is None:
                raise self._lost()
            return received
        raise self._stuck(within)

    def kill(self) -> None:
        """Ends a server that need not see to its children; the system ends those."""
        if self.serving:
            os.kill(self._pid, signal.SIGKILL)
            self._wait()

    def stop(self) -> None:
        """Ends the server and all of its children; without effect where that is done."""
        if os.getpid() != self._owner:  # a copy in a process that was forked: the server is another's
            self._end.close()
            return
        with contextlib.suppress(OSError):  # it is gone, or was told before
            self._end.settimeout(0)
            send(self._end, {"kind": "stop"})
        self._end.close()
        self._wait()

    def _lost(self) -> EngineError:
        """Returns the error for a server that is gone."""
        how = ending(self._wait())
        return EngineError(f"the fork server of engine 'process' {how}; its clients are lost: open the engine again")

    def _stuck(self, seconds: float) -> EngineError:
        """Returns the error for a server that does nothing, after ending it."""
        self.kill()
        return EngineError(f"the fork server of engine 'process' gave no answer within {seconds:g} s and was killed")

    def _wait(self) -> int:
        """Returns the server's exit code; if it does not end in time, it is killed."""
        until = time.monotonic() + PATIENCE
        while (code := self._ended()) is None:
            if time.monotonic() > until:
                os.kill(self._pid, signal.SIGKILL)
                until += PATIENCE
            time.sleep(0.001)
        return code

    def _ended(self) -> int | None:
        """Returns the server's exit code if it has ended."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:  # this process has others that wait for every child
                self._code = 0
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code
