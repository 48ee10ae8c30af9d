"""Runs a job on NVFlare and brings its run home: on a server, as an administrator does, or in NVFlare's simulator."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal.deploy.nvflare_job import MARK, RUN
from shoal.deploy.nvflare_project import ADMIN, allowing, environment, kits
from shoal.deploy.nvflare_session import Session, session, why_ended
from shoal.errors import ConfigurationError, EngineError
from shoal.runs.files import write_json

GLANCE = 1.0
"""Seconds between two looks at a job."""

LOST = 60.0
"""Seconds without an answer of the server after which it is given up."""

RESULTS = "results"
"""The folder of the deployment that results are downloaded into."""

GRACE = 15.0
"""Seconds that the simulator has to end."""


def submit(
    folder: Path, job: Path, *, show: Callable[[str], None], within: float | None, run_dir: Path | None = None
) -> Path:
    """Submits a job, follows it to its end, and downloads its result; Ctrl-C aborts it.

    Args:
        folder: A deployment's, or an administrator's startup kit.
        job: The job's folder.
        show: Is told each line that the run says.
        within: Seconds in which the job must end; it is aborted then. None for no limit.
        run_dir: Where the order has the server put the run, on this machine; None to download it.

    Returns:
        The run's folder.

    Raises:
        ConfigurationError: There is no startup kit.
        EngineError: The job was not taken, or failed, or was aborted.
    """
    kit, user = _kit(folder)
    with session(kit, user) as opened:
        number = str(opened.call("submit", str(job.absolute())))
    show(f"NVFlare has taken the job as {number}")
    try:
        status = _followed(kit, user, number, show, within)
    except BaseException:
        with contextlib.suppress(EngineError), session(kit, user) as opened:
            opened.call("abort", number)
        raise
    with session(kit, user) as opened:
        if status != "FINISHED:COMPLETED":
            told = [f"  {line}" for line in [*opened.call("log", number)[-5:], *opened.call("errors", number)]]
            raise EngineError("\n".join([f"NVFlare's job {number} ended as {status}:", *told]))
        if run_dir is not None:
            return run_dir
        where = folder / RESULTS if kit != folder else kit / "transfer"
        found = Path(opened.call("download", number, str(where.absolute()), within=3600.0))
    run = found / "workspace" / RUN
    if not run.is_dir():
        raise EngineError(f"the result of NVFlare's job {number} has no run of shoal's: see {found}")
    return run


def simulate(
    job: Path,
    workspace: Path,
    sites: int | Sequence[str],
    *,
    threads: int | None = None,
    show: Callable[[str], None] = print,
    within: float | None = None,
) -> Path:
    """Runs a job in NVFlare's simulator.

    Args:
        job: The job's folder.
        workspace: For the simulator's files. It removes what is there.
        sites: Their number, or their names.
        threads: How many of them have a process at a time; None for all.
        show: Is told each line that the run says.
        within: Seconds in which it must end; None for no limit.

    Returns:
        The run's folder.

    Raises:
        EngineError: It failed; with the last lines of its log.
    """
    count = sites if isinstance(sites, int) else len(sites)
    clients = ["-n", str(sites)] if isinstance(sites, int) else ["-c", ",".join(sites)]
    workspace = workspace.absolute()
    (workspace / "local").mkdir(parents=True, exist_ok=True)
    write_json(workspace / "local" / "resources.json", allowing({"format_version": 2, "class_allow_list": []}))
    log = workspace.with_name(f"{workspace.name}.log")
    command = [sys.executable, "-m", "nvflare.cli", "simulator", str(job.absolute()), "-w", str(workspace)]
    command += [*clients, "-t", str(threads or count)]
    surroundings = environment() | {"HOME": str(workspace.parent), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=surroundings
        )
        try:
            _watch(process, log, show, within)
        finally:
            _end(process)
    run = workspace / "server" / "simulate_job" / RUN
    if process.returncode or not run.is_dir():
        lines = log.read_text(errors="replace").splitlines()
        told = why_ended(lines) or [line for line in lines if " - ERROR - " in line][-10:] or lines[-10:]
        raise EngineError("\n".join([f"NVFlare's simulator failed; its log is {log}:", *told]))
    return run


def _kit(folder: Path) -> tuple[Path, str]:
    """Returns an administrator's startup kit, and the administrator."""
    for kit in (folder, kits(folder) / ADMIN):
        with contextlib.suppress(OSError, ValueError, KeyError):
            told = json.loads((kit / "startup" / "fed_admin.json").read_text())
            return kit, str(told["admin"]["username"])
    raise ConfigurationError(
        f"{folder} is neither a deployment of NVFlare nor an administrator's startup kit: "
        "give the folder that holds startup/fed_admin.json, or make a deployment with `shoal deploy up`"
    )


def _followed(kit: Path, user: str, number: str, show: Callable[[str], None], within: float | None) -> str:
    """Shows what a job says until it has ended; returns how it has."""
    begun = heard = time.monotonic()
    shown: list[str] = []
    opened: Session | None = None
    try:
        while True:
            try:
                opened = opened or Session(kit, user)
                status = str(opened.call("status", number))
                lines = opened.call("log", number)
                heard = time.monotonic()
            except EngineError:
                if time.monotonic() - heard > LOST:
                    raise
                if opened is not None:
                    opened.close()
                opened = None
            else:
                for line in _unseen(shown, lines):
                    show(line)
                shown = lines or shown
                if status.startswith(("FINISHED", "ABANDONED")):
                    return status
            if within is not None and time.monotonic() - begun > within:
                raise EngineError(f"NVFlare's job {number} has not ended within {within:g} s, and is aborted")
            time.sleep(GLANCE)
    finally:
        if opened is not None:
            opened.close()


def _unseen(seen: list[str], lines: list[str]) -> list[str]:
    """Returns the lines that have come since the last look.

    NVFlare gives the end of a long log alone: what was seen may lack its beginning by now.

    Args:
        seen: What the last look has found; its last line may have been written in part.
        lines: What this one has found.
    """
    for first, line in enumerate(seen):
        count = len(seen) - first
        if not lines[count - 1 : count] or not lines[0].startswith(line):
            continue
        if lines[: count - 1] == seen[first:-1] and lines[count - 1].startswith(seen[-1]):
            return lines[count:]
    return lines


def _watch(process: subprocess.Popen[bytes], log: Path, show: Callable[[str], None], within: float | None) -> None:
    """Shows what the simulator's run says until it has ended."""
    begun = time.monotonic()
    rest = ""
    with log.open(errors="replace") as lines:
        while True:
            ended = process.poll() is not None
            *whole, rest = (rest + lines.read()).split("\n")
            for line in whole:
                if f" - {MARK}" in line:
                    show(line.split(MARK, 1)[1])
            if ended:
                return
            if within is not None and time.monotonic() - begun > within:
                raise EngineError(f"NVFlare's simulator has not ended within {within:g} s, and was stopped")
            time.sleep(GLANCE / 4)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the simulator; what it has started ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(OSError):
            os.kill(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
