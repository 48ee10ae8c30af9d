"""A tracker's process, as its run sees it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Literal, cast

from shoal.runs.trackers.choice import TRACKERS

Ending = Literal["finished", "failed", "interrupted"]
"""How a run ended."""

DEADLINE = 60.0
"""Seconds that a tracker has at the end of a run to take what it has not got yet, and to let go."""

HURRY = 10.0
"""Seconds that it has when the run did not finish; what is missing then it gets at a resume."""

LATE = 3
"""The exit code of a tracker's process that has not done so."""

KILL = 5.0
"""Seconds more until its process is killed."""


class TrackerProcess:
    """Has a tracker follow a run from a process of its own. No call but :meth:`close` waits for it.

    Args:
        name: One of :data:`~shoal.runs.trackers.TRACKERS`.
        run: The run's folder. What the libraries print goes to ``NAME/output.log`` in it.
        deadline: Seconds that :meth:`close` waits.
    """

    def __init__(self, name: str, run: Path, *, deadline: float | None = None) -> None:
        self._title = TRACKERS[name]
        self._deadline = DEADLINE if deadline is None else deadline
        self._log = run / name / "output.log"
        self._notice: str | None = None
        self._told = False
        self._process: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-P", "-m", "shoal.runs.trackers", name, str(run.resolve()), str(self._deadline)]
        try:
            self._log.parent.mkdir(exist_ok=True)
            with self._log.open("ab") as log:
                self._process = _started(command, variables(name, run.resolve()), log)
        except OSError as error:
            self._notice = f"its process could not be started: {error}"

    def poke(self) -> None:
        """Tells that ``metrics.jsonl`` has grown."""
        self._send(b"\n")

    def notice(self) -> str | None:
        """Returns one line if the tracker has failed since the run began, and only once."""
        self._hear()
        if self._notice is None or self._told:
            return None
        self._told = True
        return (
            f"{self._title}: {self._notice} (see {self._log}); "
            "the run does without it, and what it misses it gets when it works again, or at a resume"
        )

    def end(self, ending: Ending) -> None:
        """Tells how the run ended."""
        if ending != "finished":
            self._deadline = min(self._deadline, HURRY)
        self._send(f"{ending}\n".encode())

    def close(self) -> None:
        """Waits until the tracker has everything and has ended; kills it after the deadline."""
        process = self._process
        if process is None:
            return
        try:
            _pipe(process.stdin).close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._deadline + KILL)
            self._hear()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
                self._notice = self._notice or self._late()
            _pipe(process.stdout).close()
            self._process = None

    def _late(self) -> str:
        return f"it had not taken everything {self._deadline:g} s after the run's end"

    def _send(self, message: bytes) -> None:
        if self._process is not None:
            # A full pipe holds more such messages than are needed, and of a process that has ended the exit code tells.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(_pipe(self._process.stdin).fileno(), message)

    def _hear(self) -> None:
        process = self._process
        if process is None or self._notice is not None:
            return
        code = process.poll()
        with contextlib.suppress(BlockingIOError):
            said = os.read(_pipe(process.stdout).fileno(), 65536).decode(errors="replace")
            self._notice = said.strip().partition("\n")[0] or None
        if self._notice is None and code == LATE:
            self._notice = self._late()
        elif self._notice is None and code:
            self._notice = f"its process ended with exit code {code}"


def variables(name: str, run: Path) -> dict[str, str]:
    """Returns the variables for a tracker's process: the user's, and what keeps it quiet and in the run's folder."""
    quiet = {
        "mlflow": {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # it is tried again with each record anyway
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        },
        "wandb": {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "WANDB_MODE": "offline"},
    }[name]
    found = quiet | os.environ
    found.pop("WANDB_SERVICE", None)  # of a run that the user's own script has open
    if name == "wandb" and found["WANDB_MODE"] == "offline":
        found |= {f"WANDB_{kind}_DIR": str(run / name / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
    return found


def _started(command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        bufsize=0,
        start_new_session=True,  # Ctrl-C is the run's to answer
    )
    for pipe in (process.stdin, process.stdout):
        os.set_blocking(_pipe(pipe).fileno(), False)
    return process


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    return cast("IO[bytes]", stream)  # the process was started with pipes
