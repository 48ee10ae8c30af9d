"""Processes that were started for a folder, and that a later command ends: none is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import ConfigurationError
from shoal.processes.table import in_sessions, marked
from shoal.runs.files import write_json

PROCESSES = "processes.json"
"""The file in the folder that names them."""

BOOT = Path("/proc/sys/kernel/random/boot_id")

MARK = "SHOAL_STARTED_FOR"
"""The environment variable of all of them, and of all that they start, with the folder.

NVFlare's jobs have sessions of their own, and are nobody's children once what started them has ended.
"""

LOOK = 0.1
"""Seconds between two looks at whether they have ended."""

FORCE = 5.0
"""Seconds in which the system ends what was killed."""


class StartedProcesses:
    """The processes of a folder, by name. Each begins a session of its own, which ends with it.

    Args:
        folder: Keeps their list, and their logs in ``logs``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> int:
        """Starts a process; what it writes goes to its log.

        Args:
            name: What messages call it, and its log.
            command: Its words.
            env: Environment variables beside this process's own.
            cwd: Where it starts; None for the folder.

        Returns:
            Its process id.

        Raises:
            ConfigurationError: The command cannot be run, or a process of that name runs.
        """
        told = self._told()
        if name in told and _lives(told[name]):
            raise ConfigurationError(f"{name} of {self.folder} runs already, as process {told[name]['pid']}")
        if name in told:  # what it has left behind would be forgotten
            _end_session(told[name])
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("ab") as out:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(env or {}), MARK: self._mark},
                    cwd=cwd or self.folder,
                    start_new_session=True,
                )
        except OSError as error:
            raise ConfigurationError(f"{name} cannot be started: {command[0]}: {error}") from error
        process.returncode = 0  # it is to outlive this object, whose end Python would warn of
        told[name] = {
            "pid": process.pid, "began": _began(process.pid), "boot": _boot(), "command": list(command)
        }  # fmt: skip
        write_json(self.folder / PROCESSES, told)
        return process.pid

    def log(self, name: str) -> Path:
        """Returns the file with what a process has written."""
        return self.folder / "logs" / f"{name}.log"

    def last_lines(self, name: str, count: int = 15) -> str:
        """Returns the end of a process's log."""
        try:
            text = self.log(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-count:])

    def alive(self) -> dict[str, bool]:
        """Returns the names, in the order of their start, and whether each process has not ended."""
        return {name: _lives(entry) for name, entry in self._told().items()}

    def check_none_runs(self) -> None:
        """Refuses to begin a deployment in a folder that has one: a failure of the second would end the first.

        Raises:
            ConfigurationError: One runs there.
        """
        if running := sorted(name for name, lives in self.alive().items() if lives):
            raise ConfigurationError(
                f"a deployment runs in {self.folder} ({', '.join(running)}): end it with `shoal deploy down` first"
            )

    def pids(self) -> dict[str, int]:
        """Returns the process ids by name."""
        return {name: entry["pid"] for name, entry in self._told().items()}

    def stop(self, *, within: float = 20.0) -> list[str]:
        """Ends all of them and all in their sessions: the newest first, by request, and then by force.

        Args:
            within: Seconds that each has to end by itself.

        Returns:
            The names of those that had to be killed.
        """
        killed = []
        for name, entry in reversed(self._told().items()):
            if not _lives(entry):
                _end_session(entry)
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.SIGTERM)
            if not _ends(entry, within):
                killed.append(name)
            _end_session(entry)
        _kill(lambda: marked(MARK, self._mark))
        (self.folder / PROCESSES).unlink(missing_ok=True)
        return killed

    @property
    def _mark(self) -> str:
        return str(self.folder.resolve())

    def _told(self) -> dict[str, Any]:
        try:
            told = json.loads((self.folder / PROCESSES).read_text(encoding="utf-8"))
            return {
                name: {**entry, "pid": int(entry["pid"]), "began": int(entry["began"])} for name, entry in told.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{self.folder / PROCESSES} cannot be read: {error!r}") from error


def _began(pid: int) -> int:
    """Returns when a process began, in ticks since the system did; 0 where there is none."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # this process's own child that has ended is to be seen as ended
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _boot() -> str:
    """Returns what tells one start of the system from the next: after it, all numbers are others'."""
    return BOOT.read_text(encoding="utf-8").strip() if BOOT.exists() else ""


def _lives(entry: Mapping[str, Any]) -> bool:
    """Tells whether a process has not ended; another that has got its number since is not it."""
    began = _began(entry["pid"])
    return began != 0 and began == entry["began"] and entry.get("boot") == _boot()


def _ends(entry: Mapping[str, Any], within: float) -> bool:
    until = time.monotonic() + within
    while _lives(entry):
        if time.monotonic() > until:
            return False
        time.sleep(LOOK)
    return True


def _end_session(entry: Mapping[str, Any]) -> None:
    """Kills what is left of a session, unless its number is another's by now."""
    if _began(entry["pid"]) not in (0, entry["began"]) or entry.get("boot") != _boot():
        return
    _kill(lambda: in_sessions([entry["pid"]]))


def _kill(found: Callable[[], list[int]]) -> None:
    """Kills processes until there are none."""
    until = time.monotonic() + FORCE
    while (left := found()) and time.monotonic() < until:
        for one in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        time.sleep(LOOK)
