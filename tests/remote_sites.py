"""Real sites on this machine, with threads in place of Flower's or NVFlare's messages."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import shoal.deploy.site_run
import shoal.federation.job
from process_table import alive, children, eventually
from shoal.deploy.bridge import ADDRESS, forward
from shoal.deploy.run_process import RunProcess
from shoal.deploy.site_settings import Allowed, Limits, settings_text
from shoal.errors import EngineError
from shoal.processes.forking import fork
from shoal.processes.messages import channel

EXPERIMENTS = Path(__file__).parent / "remote_experiments.py"


class LocalWire:
    """Brings parcels to sites' processes by their folders."""

    name = "local"

    def __init__(self, folders):
        self.folders = dict(folders)
        self._pool = ThreadPoolExecutor(16)
        self._answers = queue.Queue()
        self._count = 0
        self._forgotten = set()
        self.lost = 0
        """So many of the next answers are lost."""
        self.sent = []
        """The kind and the number of each request, in their order, with its address."""

    def present(self):
        return [name for name, folder in self.folders.items() if (folder / ADDRESS).exists()]

    def send(self, to, parcel):
        tickets = {}
        for address in to:
            self._count += 1
            tickets[address] = str(self._count)
            self.sent.append((parcel.meta["kind"], parcel.meta["number"], address))
            self._pool.submit(self._carry, tickets[address], address, parcel)
        return tickets

    def receive(self, seconds):
        wait = seconds
        while True:
            try:
                ticket, answer = self._answers.get(timeout=wait) if wait else self._answers.get_nowait()
            except queue.Empty:
                return
            wait = 0
            if ticket not in self._forgotten:
                yield ticket, answer

    def forget(self, tickets):
        self._forgotten.update(tickets)

    def close(self):
        self._pool.shutdown(cancel_futures=True)

    def _carry(self, ticket, address, parcel):
        try:
            answer = forward(parcel, self.folders[address], within=60.0)
        except Exception as error:
            answer = error
        if self.lost > 0:
            self.lost -= 1
            answer = EngineError("the answer was lost on the way")
        self._answers.put((ticket, answer))


class SiteProcesses:
    """Starts ``shoal site`` processes, and ends them.

    Args:
        folder: Has a folder for each.
        quick: Whether they, and the processes of their runs, are forked, with everything imported.
    """

    def __init__(self, folder: Path, *, quick: bool = False):
        self.folder = folder
        self.quick = quick
        self.processes = {}

    def write(self, name, *allowed: Allowed, limits: Limits | None = None):
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "site.toml").write_text(settings_text(name, allowed, limits))
        return folder

    def start(self, name):
        folder = self.folder / name
        log = (folder / "site.log").open("ab")
        with log:
            if self.quick:
                process = Forked(fork(lambda: serve_quickly(folder, log.fileno())))
            else:
                process = subprocess.Popen(
                    [sys.executable, "-m", "shoal", "site", str(folder)], stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
        self.processes[name] = process
        until = time.monotonic() + 60
        while self.told(name) != process.pid:
            assert process.poll() is None, self.log(name)
            assert time.monotonic() < until, self.log(name)
            time.sleep(0.02)
        return folder

    def told(self, name):
        """Returns which process says that it serves a site's folder."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / name / ADDRESS).read_text())["process"]

    def log(self, name):
        return (self.folder / name / "site.log").read_text()

    def kill(self, name, number=signal.SIGKILL):
        """Ends a site's process, and waits for its end."""
        process = self.processes[name]
        process.send_signal(number)
        process.wait(40)

    def below(self, name):
        """Returns the processes that descend from a site's: the run's first, then launchers and ranks."""
        found, waiting = [], [self.processes[name].pid]
        while waiting:
            found += (more := children(waiting.pop(0)))
            waiting += more
        return found

    def audit(self, name):
        """Returns the lines of a site's record."""
        path = self.folder / name / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def stop(self):
        """Ends all; returns the processes that were left behind."""
        below = [pid for name in self.processes for pid in self.below(name)]
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait(10)
        eventually(lambda: not any(map(alive, below)), 15)
        left = [pid for pid in below if alive(pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left


class Forked:
    """A forked process, as :class:`subprocess.Popen` would have it."""

    def __init__(self, pid):
        self.pid = pid
        self.returncode = None
        self._lock = threading.Lock()

    def poll(self):
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

    def wait(self, timeout):
        if not eventually(lambda: self.poll() is not None, timeout):
            raise subprocess.TimeoutExpired("forked", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def keep_only(*numbers):
    """Lets go of all files but these and the standard ones, as a program that is started has none of them.

    Their numbers stay taken: pytest's streams, to which loggers may yet write, are among them.
    """
    faulthandler.disable()
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in list(Path("/proc/self/fd").iterdir()):
        if (number := int(file.name)) > 2 and number not in (nothing, *numbers):
            with contextlib.suppress(OSError):
                os.fstat(number)
                os.dup2(nothing, number)


def serve_quickly(folder, log):
    """Is ``shoal site FOLDER`` in a forked process."""
    from shoal.cli.exits import guarded
    from shoal.cli.site import site

    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    keep_only()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shoal.deploy.site_run.RunProcess = ForkedRun
    try:
        guarded(site)(folder)
    except BaseException as end:
        os._exit(getattr(end, "exit_code", 1))


class ForkedRun(RunProcess):
    """The process of a run, forked in place of started."""

    def __init__(self, command, told, log, env):
        from shoal.experiments import at_site

        self._end, other = channel()
        log.parent.mkdir(parents=True, exist_ok=True)

        def body():
            os.setsid()
            with log.open("ab") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            number = os.dup(other.fileno())
            keep_only(number)
            sys.argv[1:] = [str(number)]
            sys.stdin = io.StringIO(json.dumps(dict(told)))
            at_site.main()

        self._process = Forked(fork(body))
        other.close()
        self._log = log
        self._stopped = False
