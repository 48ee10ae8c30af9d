"""A run handed to a SuperLink, and watched to its end."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, cast

from shoal.deploy.flower_return import Parts
from shoal.deploy.flower_server import NONCE, OUTCOME
from shoal.deploy.flower_tools import TAIL, call, environment, home_of, tool
from shoal.errors import ConfigurationError, EngineError, RunInterrupted
from shoal.runs.interrupts import deferred

ANSWER = 60.0
"""Seconds in which a command of ``flwr`` must answer."""

REACH = 5.0
"""Seconds in which the SuperLink must take a connection."""

LOOK = 15.0
"""Seconds between two questions whether the run has ended, while its log says nothing of that; each starts a Python."""

LOST = 120.0
"""Seconds in which a SuperLink that does not answer must be back."""

STOPPED = 60.0
"""Seconds in which a run that was told to stop must have ended."""

DRAIN = 20.0
"""Seconds without a line after which a log that has not ended is taken to have."""

DONE = "finished:completed"

FLOWERS = re.compile(
    r"\s*(\x1b\[\d+m)?\s*(DEBUG|INFO|WARNING|ERROR)\s*(\x1b\[0m)?\s*:|Using SuperLink: |Successfully installed |\s*$"
)
"""How lines begin that Flower's own processes write."""


def submit(
    folder: Path | None,
    app: Path,
    *,
    connection: str,
    show: Callable[[str], None],
    within: float | None = None,
    bring: Path | None = None,
) -> None:
    """Runs an app on a SuperLink, and returns when the run has completed; Ctrl-C stops it there too.

    Args:
        folder: Of a deployment on this machine, whose SuperLink is meant; None where the user's own Flower
            configuration says which is.
        app: Written by ``write_app``.
        connection: The SuperLink's name in Flower's configuration.
        show: Gets each line that the run writes.
        within: Seconds in which the run must have ended; None for as long as it takes.
        bring: A new folder to which the run's is brought from the SuperLink's machine, without its checkpoints. None
            where it is this machine, or the run's folder is to stay there.

    Raises:
        ConfigurationError: Flower's configuration does not name the SuperLink.
        EngineError: The SuperLink is not there, or the run did not complete; with what it wrote last.
        RunInterrupted: Ctrl-C came; the run was stopped.
    """
    home = None if folder is None else home_of(folder)
    env = environment(home)
    _check_reached(home, connection, env)
    nonce = secrets.token_hex(8)
    parts = None if bring is None else Parts(nonce, bring)
    more = [] if parts is None else ["--run-config", f'{NONCE}="{nonce}"']
    with deferred(signal.SIGINT, signal.SIGTERM):  # or there would be a run that nobody knows the number of
        answer = call(["run", str(app.resolve()), connection, *more], env, within=ANSWER)
    run = _Run(str(answer["run-id"]), connection, env, show, parts)
    try:
        run.watch(within)
        if parts is not None:
            show(parts.finish())
    except KeyboardInterrupt as stopped:
        show(f"stopping run {run.number} of Flower's …")
        run.stop()
        raise RunInterrupted(f"run {run.number} was stopped; what it had saved is in its run folder") from stopped
    finally:
        run.close()
        if parts is not None:
            parts.close()


class _Run:
    """A run that has been submitted.

    Args:
        number: Flower's.
        connection: The SuperLink's name.
        env: Of Flower's commands.
        show: Gets each line that is the run's own.
        parts: Gets those with which its folder comes.
    """

    def __init__(
        self, number: str, connection: str, env: Mapping[str, str], show: Callable[[str], None], parts: Parts | None
    ) -> None:
        self.number = number
        self._parts = parts
        self._connection, self._env, self._show = connection, env, show
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._last: deque[str] = deque(maxlen=TAIL)
        self._outcome = ""
        self._seen = 0
        self._cut = False
        self._log = self._follow()

    def watch(self, within: float | None) -> None:
        """Shows what the run writes until it has ended.

        Raises:
            EngineError: It did not complete, or not in time, or the SuperLink is gone.
        """
        until = None if within is None else time.monotonic() + within
        answered = time.monotonic()
        while True:
            self._take(until)
            try:
                status, details = self._status()
                answered = time.monotonic()
            except EngineError as error:
                if time.monotonic() - answered > LOST:
                    raise EngineError(f"run {self.number}: its SuperLink is gone for {LOST:g} s: {error}") from error
                continue
            if status.startswith("finished"):
                self._drain()
                self._check(status, details)
                return
            if until is not None and time.monotonic() > until:
                self.stop()
                raise EngineError(f"run {self.number} had not ended after {within:g} s and was stopped")
            if self._cut:  # the log's end was not the run's
                self._log.wait()
                self._log = self._follow()

    def stop(self) -> None:
        """Tells the SuperLink to stop the run, and waits for its end, but not for ever."""
        with contextlib.suppress(EngineError):
            call(["stop", self.number, self._connection], self._env, within=ANSWER)
        until = time.monotonic() + STOPPED
        while time.monotonic() < until:
            with contextlib.suppress(EngineError):
                if self._status()[0].startswith("finished"):
                    return
            time.sleep(1.0)

    def close(self) -> None:
        """Ends what reads the log."""
        with contextlib.suppress(OSError):
            self._log.kill()
        self._log.wait()

    def _follow(self) -> subprocess.Popen[bytes]:
        """Starts to read the log from its beginning; lines that were read before are not shown again."""
        self._cut = False
        process = subprocess.Popen(
            [tool("flwr"), "log", self.number, self._connection, "--stream"],
            env={**self._env, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what the command says itself would be counted as lines of the run
            start_new_session=True,  # Ctrl-C comes to this process alone
        )
        stream = cast("IO[bytes]", process.stdout)
        threading.Thread(target=_read, args=(stream, self._seen, self._lines), name="shoal-log", daemon=True).start()
        return process

    def _take(self, until: float | None) -> None:
        """Shows lines until there is a reason to ask how the run stands."""
        ask = time.monotonic() + LOOK
        if until is not None:
            ask = min(ask, until)
        while (left := ask - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                return
            if line is None:
                self._cut = True
                time.sleep(0.5)  # the log ends a moment before the run does
                return
            self._line(line)

    def _drain(self) -> None:
        """Shows what was written last, once the run has ended and its log is about to."""
        while not self._cut:
            try:
                line = self._lines.get(timeout=DRAIN)
            except queue.Empty:
                return
            if line is None:
                return
            self._line(line)

    def _line(self, line: str) -> None:
        self._seen += 1
        if FLOWERS.match(line) or self._outcome or (self._parts is not None and self._parts.take(line)):
            return
        self._last.append(line)
        if line.startswith(OUTCOME):
            self._outcome = line.removeprefix(OUTCOME)
        self._show(line)

    def _status(self) -> tuple[str, str]:
        told = call(["list", self._connection, "--run-id", self.number], self._env, within=ANSWER)["runs"][0]
        return str(told["status"]), str(told.get("status-details") or "")

    def _check(self, status: str, details: str) -> None:
        if status == DONE:
            return
        failed = f"run {self.number} of Flower's did not complete ({status})"
        if self._outcome:
            raise EngineError(f"{failed}: {self._outcome}")
        wrote = "\n".join(self._last) or "(nothing)"
        raise EngineError(f"{failed}: {details or 'nobody says why'}; it wrote last:\n{wrote}")


def _read(stream: IO[bytes], skip: int, lines: queue.SimpleQueue[str | None]) -> None:
    with stream:
        for number, line in enumerate(stream):
            if number >= skip:
                lines.put(line.decode("utf-8", "replace").rstrip("\n"))
    lines.put(None)


def _check_reached(home: Path | None, connection: str, env: Mapping[str, str]) -> None:
    """Makes sure that somebody listens where Flower's configuration says that the SuperLink is.

    Raises:
        ConfigurationError: It does not name the SuperLink.
        EngineError: Nobody does.
    """
    folder = home or Path(env.get("FLWR_HOME") or Path.home() / ".flwr")
    path = folder / "config.toml"
    try:
        known = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path} is not there: name the SuperLink in [superlink.{connection}]") from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    address = known.get(connection, {}).get("address") if isinstance(known.get(connection), dict) else None
    if not isinstance(address, str):
        names = ", ".join(sorted(name for name, said in known.items() if isinstance(said, dict))) or "none"
        raise ConfigurationError(f"{path} names no SuperLink {connection!r} with an address; it names: {names}")
    host, _, port = address.rpartition(":")
    if os.environ.get("https_proxy") and host not in {"127.0.0.1", "localhost"}:
        return  # it may be reached through that alone
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH).close()
    except (OSError, ValueError) as error:
        raise EngineError(f"no SuperLink answers at {address}: {error}; start it, or mend {path}") from error
