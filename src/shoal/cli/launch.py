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

from shoal.cli.exits import FAILED, INTERRUPTED, TERMINATED, Terminated, exit_code
from shoal.errors import ConfigurationError, WorkerError

LAUNCHER = "SHOAL_LAUNCHER"
"""Set in the environment of the processes that :func:`launch` starts."""

GRACE = 20.0
"""Seconds that the other workers have to notice that one has failed, to save their state and to say so."""

STOP = 60.0
"""Seconds that the workers have to save their state after Ctrl-C or SIGTERM."""

KILL = 5.0
"""Seconds from SIGTERM to SIGKILL."""


def launch_if_asked(workers: int | None, *, max_restarts: int = 0) -> None:
    """Runs this process's command in several workers and exits, unless it is one of them already.

    Args:
        workers: How many; None for no launch.
        max_restarts: How often to start all again after one of them failed.

    Raises:
        ConfigurationError: The number cannot be, or another launcher has started workers already.
    """
    if LAUNCHER in os.environ:
        return
    if workers is None:
        if max_restarts and "TORCHELASTIC_RESTART_COUNT" not in os.environ:
            raise ConfigurationError("--max-restarts starts failed workers again: say how many with --workers")
        return
    if workers < 1 or max_restarts < 0:
        raise ConfigurationError(f"--workers must be ≥ 1 and --max-restarts ≥ 0, not {workers} and {max_restarts}")
    if "RANK" in os.environ:
        raise ConfigurationError("a launcher such as torchrun has started the workers already: leave --workers out")
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
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(workers))),
            LAUNCHER: str(os.getpid()),
        }
        command = [sys.executable, "-m", "shoal", *arguments]
        # In groups of their own: Ctrl-C comes to this process alone, which passes it on once and to worker 0 alone.
        self._processes = [
            subprocess.Popen(
                command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, process_group=0
            )
            for rank in range(workers)
        ]
        self._deadline: float | None = None

    def wait(self) -> int:
        """Waits until all workers have ended; returns the exit code of the command."""
        while True:
            try:
                return self._wait()
            except KeyboardInterrupt as interrupt:
                if self._deadline is not None:
                    self._end(signal.SIGTERM)
                    return _interrupted(interrupt)
                # Worker 0 saves the state and tells the others.
                self._signal(0, signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
                self._deadline = time.monotonic() + STOP

    def _wait(self) -> int:
        while any(process.poll() is None for process in self._processes):
            time.sleep(0.05)
            if self._deadline is None and any(process.poll() for process in self._processes):
                self._deadline = time.monotonic() + GRACE
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end(signal.SIGTERM)
        return self._verdict()

    def _verdict(self) -> int:
        """Names the workers that a signal ended, and returns the first exit code that is not 0."""
        codes = [process.returncode for process in self._processes]
        for rank, (code, process) in enumerate(zip(codes, self._processes, strict=True)):
            if code < 0 and code != -signal.SIGTERM:
                _say(f"worker {rank} (process {process.pid}) was ended by {signal.Signals(-code).name}")
        code = next((code for code in codes if code), 0)
        return FAILED if code < 0 else code

    def _end(self, number: signal.Signals) -> None:
        for rank in range(len(self._processes)):
            self._signal(rank, number)
        deadline = time.monotonic() + KILL
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.01))
        for process in self._processes:
            process.kill()
            process.wait()

    def _signal(self, rank: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._processes[rank].send_signal(number)


@contextlib.contextmanager
def among_workers() -> Iterator[None]:
    """Joins the other workers, if there are any, for what a command does; of an error only one of them speaks.

    Worker 0 tells the user what ends the run, its own errors and the others'. Another worker speaks only if worker 0
    cannot be told any more.
    """
    from shoal.engines import Workers, launched_workers

    if not launched_workers():
        yield
        return
    _end_with_launcher()
    workers = Workers.join()
    try:
        with workers:
            yield
    except (Exception, KeyboardInterrupt) as error:
        known = workers.told or (isinstance(error, WorkerError) and error.told_by_leader)
        if workers.leads or not known:
            raise
        raise typer.Exit(exit_code(error)) from error


def _end_with_launcher() -> None:
    """Lets the system end this process when its launcher ends, however that ends."""
    if LAUNCHER not in os.environ:
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHER]):
        raise Terminated


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _threads(workers: int) -> int:
    return max(len(os.sched_getaffinity(0)) // workers, 1)


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED


def _say(text: str) -> None:
    print(f"shoal: {text}", file=sys.stderr)
