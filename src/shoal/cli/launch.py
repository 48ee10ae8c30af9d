"""``--workers``: the same command in several processes on this machine, watched until all have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import typer

from shoal.cli.child import LAUNCHER, end_with_launcher
from shoal.cli.exits import FAILED, exit_code
from shoal.devices import Launched, cores_each
from shoal.errors import ConfigurationError

GRACE = 8.0
"""Seconds that the other workers have to notice that one has ended, to save their state and to say so."""

STOP = 60.0
"""Seconds that they have to do so after Ctrl-C or SIGTERM."""

KILL = 4.0
"""Seconds from SIGTERM to SIGKILL."""


def launch_if_asked(workers: int | None, *, max_restarts: int = 0) -> None:
    """Runs this process's command in several workers and exits, unless it is one of them already.

    Args:
        workers: How many; None for no launch.
        max_restarts: How often to start all again after one of them failed.

    Raises:
        ConfigurationError: The number cannot be, or another launcher has started workers already.
    """
    if LAUNCHER in os.environ or (workers is None and not max_restarts):
        return
    if Launched.here() is not None:
        raise ConfigurationError(
            "a launcher such as torchrun has started the workers already: leave --workers out, "
            "and give --max-restarts to the launcher"
        )
    if workers is None:
        raise ConfigurationError("--max-restarts starts failed workers again: say how many with --workers")
    if workers < 1 or max_restarts < 0:
        raise ConfigurationError(f"--workers must be ≥ 1 and --max-restarts ≥ 0, not {workers} and {max_restarts}")
    raise typer.Exit(launch(workers, sys.argv[1:], max_restarts=max_restarts))


def launch(workers: int, arguments: Sequence[str], *, max_restarts: int = 0) -> int:
    """Runs ``shoal`` with the same arguments in several processes; returns the exit code.

    Args:
        workers: How many.
        arguments: The command line after ``shoal``.
        max_restarts: How often to start all again after one of them failed.
    """
    for restarts in range(max_restarts + 1):
        code = _Launch(workers, arguments, restarts).wait()
        if code != FAILED or restarts == max_restarts:
            break
        _say(f"starting all {workers} workers again (restart {restarts + 1} of at most {max_restarts})")
    return code


class _Launch:
    """The workers' processes, from their start to the end of the last."""

    def __init__(self, workers: int, arguments: Sequence[str], restarts: int) -> None:
        common = {
            "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores_each(workers))),
            LAUNCHER: str(os.getpid()),
        }
        command = [sys.executable, "-m", "shoal", *arguments]
        # In groups of their own: Ctrl-C comes to this process alone, and what they start can be ended with them.
        self._processes = [
            subprocess.Popen(
                command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, process_group=0
            )
            for rank in range(workers)
        ]
        self._asked = False
        """Whether they have been asked to end."""
        self._killed: set[int] = set()
        """Those that did not."""

    def wait(self) -> int:
        """Waits until all workers have ended; returns the exit code of the command."""
        try:
            while self._running() and not self._code():
                time.sleep(0.05)
            self._wait(GRACE)
            self._end(KILL)
        except KeyboardInterrupt as interrupt:
            with contextlib.suppress(KeyboardInterrupt):  # another one means: at once
                self._end(STOP)
            self._kill()
            return self._verdict() and exit_code(interrupt)
        return self._verdict()

    def _running(self) -> list[int]:
        return [rank for rank, process in enumerate(self._processes) if process.poll() is None]

    def _code(self) -> int:
        """Returns the first exit code that is not 0."""
        return next((process.returncode for process in self._processes if process.returncode), 0)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _end(self, seconds: float) -> None:
        """Ends those that are still there: worker 0 saves the state, if they are given the time."""
        for rank in self._running():
            self._asked = True
            self._processes[rank].terminate()
        self._wait(seconds)
        self._kill()

    def _kill(self) -> None:
        for rank in self._running():
            self._killed.add(rank)
            self._processes[rank].kill()
            self._processes[rank].wait()

    def _verdict(self) -> int:
        """Says which workers a signal has ended, ends what they have left behind, and returns the exit code."""
        for rank, process in enumerate(self._processes):
            code = process.returncode
            if code >= 0:
                continue
            if rank in self._killed:
                _say(f"worker {rank} (process {process.pid}) did not end and was killed")
            elif not (self._asked and code == -signal.SIGTERM):
                _say(f"worker {rank} (process {process.pid}) was ended by {signal.Signals(-code).name}")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = self._code()
        return FAILED if code < 0 else code


@contextlib.contextmanager
def among_workers() -> Iterator[None]:
    """Joins the other workers, if there are any, for what a command does; of an error only one of them speaks."""
    from shoal.engines import Workers, launched_workers

    if not launched_workers():
        yield
        return
    end_with_launcher()
    try:
        with Workers.join():
            yield
    except (Exception, KeyboardInterrupt) as error:
        if Workers.here().speaks:
            raise
        raise typer.Exit(exit_code(error)) from error


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _say(text: str) -> None:
    print(f"shoal: {text}", file=sys.stderr)
