"""The process at a site that works for one run: it alone has the experiment's code and the ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from shoal.deploy.parcel import Parcel, read_parcel, write_parcel
from shoal.errors import EngineError
from shoal.processes.forking import ending
from shoal.processes.messages import channel, receive, send
from shoal.processes.table import in_sessions
from shoal.processes.tensors import anonymous_file

LEAVE = 15.0
"""Seconds in which it ends its ranks and itself when it is told to."""

LOOK = 0.05


class RunProcess:
    """Starts the process, and asks it.

    Args:
        command: Starts it; the number of its socket comes after.
        told: Which experiment, and how. It reads that from its standard input, as JSON: a command line, which all users
            of the machine see, is no place for a site's own settings.
        log: The file that takes what it and its ranks write.
        env: Environment variables beside this process's own.

    Raises:
        EngineError: It cannot be started.
    """

    def __init__(self, command: Sequence[str], told: Mapping[str, Any], log: Path, env: Mapping[str, str]) -> None:
        self._end, other = channel()
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as out, _file_of(json.dumps(dict(told))) as given:
                self._process = subprocess.Popen(
                    [*command, str(other.fileno())],
                    stdin=given,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=[other.fileno()],
                    env={**os.environ, **env},
                    start_new_session=True,
                )
        except OSError as error:
            self._end.close()
            raise EngineError(f"the process of a run cannot be started: {error}") from error
        finally:
            other.close()
        self._log = log
        self._stopped = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def ask(self, parcel: Parcel, *, within: float) -> Parcel:
        """Gives it a task, and returns its answer.

        Raises:
            EngineError: It ended, or gave no answer in time; it is to be stopped.
        """
        try:
            fd = write_parcel(parcel)
            try:
                self._end.settimeout(within)
                send(self._end, {"task": True}, fd)
            finally:
                os.close(fd)
            received = receive(self._end)
        except TimeoutError as error:
            raise EngineError(f"the run's process at this site gave no answer within {within:g} s") from error
        except OSError:
            received = None
        except ValueError as error:
            raise EngineError(f"what the run's process at this site answered cannot be read: {error}") from error
        if self._stopped:
            raise EngineError("the run's process at this site was stopped")
        if received is None or received[1] is None:
            raise self.ended()
        return read_parcel(received[1])

    def ended(self) -> EngineError:
        """Returns what to say of its end."""
        return EngineError(f"the run's process at this site {ending(self._wait())}; its log is {self._log.name}")

    def stop(self) -> None:
        """Ends it, and its ranks, whatever they are at; without effect where that is done."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)  # who waits here for an answer is told, which closing does not do
        self._end.close()  # at which it ends by itself
        sessions = [self._process.pid]
        until = time.monotonic() + LEAVE
        while self.alive and time.monotonic() < until:
            time.sleep(LOOK)
        if self.alive:  # its ranks end by themselves where it is gone
            for pid in in_sessions(sessions):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._wait()

    def _wait(self) -> int:
        """Returns its exit code; if it does not end soon, it is killed."""
        try:
            return self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(5.0)


def _file_of(text: str) -> IO[bytes]:
    """Returns a file in memory to read a text from; unlike a pipe, it waits for no reader, and misses none."""
    file = os.fdopen(anonymous_file("shoal-told"), "w+b")
    file.write(text.encode())
    file.seek(0)
    return file
