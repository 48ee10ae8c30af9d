"""Federations of :mod:`engine_experiment` that run in a thread, so that a test can kill what they consist of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from safetensors.numpy import load_file

import engine_experiment
from process_table import eventually
from shoal.deploy.order import Order

FILE = Path(engine_experiment.__file__)


class Run:
    """A federation.

    Args:
        submit: Runs an order to its end: takes it, a new folder for files, and what shows lines.
        folder: For the test's files.
        settings: Of the experiment.
    """

    def __init__(self, submit, folder, **settings):
        self.pids = folder / "pids"
        self.pids.mkdir(exist_ok=True)
        self.run_dir = folder / "run"
        self.lines = []
        self.error = None
        self._submit, self._folder = submit, folder
        self._settings = {name: str(value) for name, value in {"pids": self.pids, **settings}.items()}
        self._thread = None

    def start(self, *, resume=False):
        """Submits it."""
        order = Order(
            experiment=str(FILE), name="two", settings=self._settings, run_dir=str(self.run_dir), resume=resume
        )
        self._thread = threading.Thread(
            target=self._run, args=(order, self._folder / f"submitted-{resume}"), daemon=True
        )
        self._thread.start()
        return self

    def end(self):
        """Waits for its end; returns the weights."""
        self._thread.join(300)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return load_file(self.run_dir / "model.safetensors")["w"]

    def records(self):
        """Returns what is known of its rounds."""
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_round(self, number):
        """Waits until so many rounds are over."""
        assert eventually(lambda: len(self.records()) >= number or self.error, 200)
        assert self.error is None, self.lines

    def _run(self, order, scratch):
        try:
            self._submit(order, scratch, self.lines.append)
        except BaseException as error:
            self.error = error


def exported_and_submitted(folder, engine, server, **env):
    """Exports the experiment and submits it by command, as to a server somewhere else; returns the run's folder.

    Args:
        folder: For the test's files.
        engine: ``flower`` or ``nvflare``.
        server: As ``shoal submit`` takes it.
        env: Environment variables beside this process's own.
    """
    pids, there, run = folder / "pids", folder / "exported", folder / "home" / "run"
    pids.mkdir()
    more = ["--to", engine, "--name", "two", "--at", FILE, "--set", f"pids={pids}"]
    for words in (["export", FILE, there, *more], ["submit", there, server, "--run-dir", run]):
        done = subprocess.run(
            [sys.executable, "-m", "shoal", *map(str, words)], env={**os.environ, **env}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"the run is in {run}" in done.stdout
    return run


def cmdline(pid):
    """Returns the words of a process's command; none where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def ranks_at(site, pids):
    """Returns the ranks of a site that note themselves in a folder, without its launcher."""
    from shoal.processes.table import marked

    return [
        int(path.name)
        for path in pids.iterdir()
        if int(path.name) in marked("SHOAL_SITE", site)
        and b"shoal.sites.agent" not in cmdline(int(path.name))
        and cmdline(int(path.name))
    ]
