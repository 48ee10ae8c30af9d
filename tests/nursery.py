"""Processes that have everything imported when they start, because they are forked: for tests that need many.

Run as a program it is the nursery: it reads requests, one JSON object a line, and answers each in the same way. A child
leaves the nursery's loop and runs to the end of the program, so that it ends like any process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000

PRELOADED = (
    "federations",
    "forked",
    "plotly.graph_objects",
    "plotly.io",
    "rank_trainings",
    "safetensors.numpy",
    "scipy.signal",
    "shoal.engines.torch_group",
    "shoal.experiments",
    "shoal.learners.torch",
    "sklearn.datasets",
    "tensorboardX",
    "torch._dynamo",  # which the first step of an optimizer imports
)


class Child:
    """A process of the nursery's."""

    def __init__(self, nursery, pid, output):
        self.pid = pid
        self.output = output
        self._nursery = nursery
        self._code = None

    @property
    def code(self):
        """Its exit code, minus the signal that ended it; None while it runs."""
        if self._code is None:
            self._code = self._nursery.ask(poll=self.pid)
        return self._code

    def wait(self, seconds=60.0):
        """Returns its exit code."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            assert time.monotonic() < deadline, f"it still runs after {seconds} s:\n{self.told}"
            time.sleep(0.01)
        return self.code

    def send(self, number):
        os.kill(self.pid, number)

    @property
    def told(self):
        """What it has written to standard output and standard error."""
        return self.output.read_text()


class Nursery:
    """Starts processes, each in a process group of its own, and kills what is left of them at the end."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )

    def ask(self, **request):
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, run, *, output, errors=None, arguments=(), environment=None, cwd=".", settings=None, host=None):
        """Starts a process.

        Args:
            run: The function to run, as ``module:name``.
            output: The file for what it writes.
            errors: The file for what it writes to standard error, where that is not to be the same.
            arguments: ``sys.argv[1:]``.
            environment: Set, on top of this process's.
            cwd: Where.
            settings: Set in modules before the start, by ``module:name``.
            host: The network namespace to run in, as on a machine of that name.
        """
        pid = self.ask(
            run=run, output=str(output), errors=str(errors or output), arguments=[*map(str, arguments)],
            environment=environment or {}, cwd=str(cwd), settings=settings or {}, host=host,
        )  # fmt: skip
        return Child(self, pid, Path(output))

    def close(self):
        self._process.stdin.close()  # at its end the nursery kills what is left
        self._process.stdout.close()
        self._process.wait(10)


def move_to(host):
    """Moves this process to a network namespace, on a machine of that name as far as it can tell."""
    system = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{host}") as handle:  # noqa: PTH123 - its number is wanted, not its content
        if system.setns(handle.fileno(), CLONE_NEWNET) or system.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), f"cannot move to {host}")
    socket.sethostname(host)


def become(request):
    """Makes this process, just forked, the one that was asked for; returns what it is to run."""
    os.setpgid(0, 0)
    if request["host"]:
        move_to(request["host"])
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    output, errors = (os.open(request[stream], flags, 0o644) for stream in ("output", "errors"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((nothing, 0), (output, 1), (errors, 2)):
        os.dup2(number, target)
    sys.argv[1:] = request["arguments"]
    for name, value in request["settings"].items():
        module, _, attribute = name.partition(":")
        setattr(importlib.import_module(module), attribute, value)
    module, _, function = request["run"].partition(":")
    return getattr(importlib.import_module(module), function)


def main():
    """Is the nursery; in a child it returns what that is to run."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()

    children = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if children[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                children[pid] = os.waitstatus_to_exitcode(status) if ended else None
            print(json.dumps(children[pid]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            return become(request)
        children[pid] = None
        print(json.dumps(pid), flush=True)
    for pid, code in children.items():
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    return None


if __name__ == "__main__":
    function = main()
    if function is not None:
        function()
