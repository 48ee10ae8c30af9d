"""A ``shoal site`` that belongs to one job: started by a client of an engine, and ended with it, whatever happens.

The engine's processes may be killed, or replaced by others at any time. So the site is a child of an attendant, which
watches the process that stands for the job and ends the site when that one is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from shoal.deploy.bridge import ADDRESS
from shoal.errors import ConfigurationError, EngineError
from shoal.processes.table import handle, in_sessions, kill, standing
from shoal.runs.files import write_json

ATTENDANT = "attendant.json"
"""The file in the site's folder with the number of the attendant."""

LOG = "site.log"
"""The file there with what the site says."""

STARTING = 60.0
"""Seconds in which the site must listen."""

ENDING = 10.0
"""Seconds that a site has to end by itself."""

GLANCE = 0.2

PR_SET_PDEATHSIG = 1


class PrivateSite:
    """The site of one client in one job.

    Another process may have started it: one that stood for the same client before.

    Args:
        folder: The site's; it is made.
        ends_with: The process with which it ends.
    """

    def __init__(self, folder: Path, *, ends_with: int) -> None:
        self.folder = folder
        self._ends_with = ends_with

    def start(self, command: Callable[[], Sequence[str]], *, aborted: Callable[[], bool]) -> None:
        """Starts the site unless it runs, and waits until it listens.

        Args:
            command: Returns what starts it.
            aborted: Tells whether to wait no longer.

        Raises:
            EngineError: It has ended, or does not listen in time; with the last lines of its log.
        """
        if self._attendant() is not None and (self.folder / ADDRESS).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ADDRESS).unlink(missing_ok=True)
        attended = [sys.executable, "-m", __name__, str(self._ends_with), "--", *command()]
        with (self.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                attended, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        write_json(self.folder / ATTENDANT, {"pid": process.pid})
        until = time.monotonic() + STARTING
        while not (self.folder / ADDRESS).exists():
            if process.poll() is not None:
                raise EngineError(f"the shoal site of this client has ended:\n{self._last_lines()}")
            if aborted():
                return
            if time.monotonic() > until:
                self.stop()
                raise EngineError(f"the shoal site does not listen after {STARTING:g} s:\n{self._last_lines()}")
            time.sleep(GLANCE)

    def stop(self) -> None:
        """Ends the site, and waits for that."""
        pid = self._attendant()
        if pid is None:
            return
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + ENDING + 2
        while self._attendant() is not None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(GLANCE)

    def _attendant(self) -> int | None:
        """Returns the number of the attendant; None where none is alive."""
        try:
            pid = int(json.loads((self.folder / ATTENDANT).read_text())["pid"])
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError, KeyError, TypeError):
            return None
        stands = standing(pid)
        return pid if stands is not None and stands.state not in "ZX" and __name__.encode() in arguments else None

    def _last_lines(self) -> str:
        with contextlib.suppress(OSError):
            return "\n".join((self.folder / LOG).read_text(errors="replace").splitlines()[-10:])
        return ""


def attend(watched: int, command: Sequence[str]) -> int:
    """Runs a command until it ends, or the watched process does, or this one is told to.

    Args:
        watched: The number of a process.
        command: What to run; with all that it starts it has a session of its own.

    Returns:
        The command's exit code.
    """
    other = handle(watched)
    if other is None:
        return 0
    told, tell = os.pipe()

    def end(_number: int, _frame: FrameType | None) -> None:
        os.write(tell, b".")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)  # noqa: PLW1509
    own = handle(child.pid)
    own_or_none = [] if own is None else [own]
    select.select([other, told, *own_or_none], [], [])
    with contextlib.suppress(OSError):
        os.kill(child.pid, signal.SIGTERM)
    select.select(own_or_none, [], [], ENDING)
    _end_session(child)
    return child.returncode


def _end_with_parent() -> None:
    """Has this process be told to end when its parent has ended, even by force; it has no threads yet."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """Ends a process, whose end nobody has waited for, and all that is in its session."""
    for pid in in_sessions([child.pid]):
        if (one := handle(pid)) is not None:
            kill(one)
            os.close(one)
    child.wait()


def main(arguments: Sequence[str]) -> int:
    """Attends to a command: ``PID -- COMMAND …``.

    Raises:
        ConfigurationError: The arguments are others.
    """
    if len(arguments) < 3 or not arguments[0].isdigit() or arguments[1] != "--":
        raise ConfigurationError("the arguments are: PID -- COMMAND …")
    return attend(int(arguments[0]), arguments[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
