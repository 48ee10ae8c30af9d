"""Real sites on this machine, with threads in place of Flower's or NVFlare's messages."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shoal.deploy.bridge import ADDRESS, forward
from shoal.deploy.site_settings import Allowed, Limits, settings_text
from shoal.errors import EngineError


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

    def present(self):
        return [name for name, folder in self.folders.items() if (folder / ADDRESS).exists()]

    def send(self, to, parcel):
        tickets = {}
        for address in to:
            self._count += 1
            tickets[address] = str(self._count)
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

    def _carry(self, ticket, address, parcel):
        try:
            answer = forward(parcel, self.folders[address], within=120.0)
        except Exception as error:
            answer = error
        if self.lost > 0:
            self.lost -= 1
            answer = EngineError("the answer was lost on the way")
        self._answers.put((ticket, answer))


class SiteProcesses:
    """Starts ``shoal site`` processes, and ends them."""

    def __init__(self, folder: Path):
        self.folder = folder
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
            process = subprocess.Popen(
                [sys.executable, "-m", "shoal", "site", str(folder)], stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.processes[name] = process
        until = time.monotonic() + 60
        while not (folder / ADDRESS).exists():
            assert process.poll() is None, (folder / "site.log").read_text()
            assert time.monotonic() < until, (folder / "site.log").read_text()
            time.sleep(0.05)
        return folder

    def stop(self):
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait(10)
