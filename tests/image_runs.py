"""Runs of the example that trains on images: its scripts in this process, and its launchers."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from pictures import EXAMPLE
from process_table import alive, children, eventually

PROMISED = 30.0
"""Seconds in which all have ended after one has."""

MODULES = ("images", "images_tf", "images_torch")
PLACES = ("MASTER_ADDR", "NODE_RANK", "TF_CONFIG", "WORKERS")
"""What says where nodes are."""


@contextmanager
def scripts_here(monkeypatch, folder):
    """Yields what runs a script in this process and a folder, and returns its exit code."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.chdir(folder)

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE / script), *map(str, words)])
        try:
            runpy.run_path(str(EXAMPLE / script), run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    yield run
    for name in MODULES:
        sys.modules.pop(name, None)


@contextmanager
def launches(script, first):
    """Yields what starts a launcher in a folder, by default the first; what is left of any is killed at the end."""
    started = []

    def start(*words, host=None, folder=first, **environment):
        folder.mkdir(exist_ok=True)
        enter = ["ip", "netns", "exec", host.name] if host else []
        kept = {name: value for name, value in os.environ.items() if name not in PLACES}
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [*enter, EXAMPLE / script, *map(str, words)],
                cwd=folder,
                env=kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def code_of(process, seconds=150.0):
    """Waits for a launcher; returns its exit code."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        folder = Path(f"/proc/{process.pid}/cwd").readlink()
        told = [f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("job*"))]
        tree = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below(process.pid)]
        pytest.fail(f"it still runs after {seconds} s: {tree}\n{''.join(told)}")


def below(pid):
    """Returns all processes that a process has started, and that they have."""
    return [found for child in children(pid) for found in (child, *below(child))]


def node(process, *words):
    """Returns the process that a launcher has started with some words among its command's."""
    wanted = b"\0%s\0" % "\0".join(words).encode()
    (found,) = (pid for pid in children(process.pid) if wanted in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


def all_gone(pids):
    return eventually(lambda: not any(alive(pid) for pid in pids))
