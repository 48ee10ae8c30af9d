"""Workers as launchers start them: on this machine or on several hosts, with faults, and what came of them."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import federations
from support import timeless

TESTS = Path(__file__).parent
EXPERIMENT = TESTS / "federations.py"
SOON = 20.0
"""Seconds in which all have ended after one has; 30 are promised."""

LONG = ("--set", "pause=0.02")
"""Makes a run last for a few seconds."""

QUICK = {
    "shoal.engines.control:BEAT": 0.2,
    "shoal.engines.control:SILENCE": 2.0,
    "shoal.engines.torch_group:STALL": 3.0,
}
"""Settings with which a silence is noticed at a pace for tests."""

PLACES = {
    "joining": ("torch.distributed:init_process_group", 1),
    "agreeing": ("shoal.engines:Workers.agree", 1),
    "opening the folder": ("shoal.federation.run:RunFolder.open", 1),
    "the first state": ("shoal.engines:Workers.copy_leader", 1),
    "training": ("shoal.engines.sequential:attempt", 3),
    "a client": ("shoal.learners.torch:TorchLearner.fit", 2),
    "the sum": ("torch.distributed:all_reduce", 3),
    "measuring": ("shoal.learners.torch:TorchLearner.evaluate", 4),
    "saving": ("shoal.runs.checkpoints:Checkpoints.save", 2),
    "delivering": ("shoal.federation.storage:RunStorage.deliver", 1),
    "the last copy": ("shoal.engines:Workers.copy_leader", 2),
}

ERROR = re.compile(r"^shoal: (?:error: )?(.*)$", re.M)


def fault(place, rank, does, when="before"):
    """Returns what :func:`federations.install_fault` is to do at a place of the run."""
    where, call = PLACES[place]
    return {"rank": rank, "where": where, "call": call, "after": when == "after", "does": does}


def federate(folder, *more):
    """Returns the words of the command that runs the experiment."""
    return ["federate", EXPERIMENT, "--run-dir", folder / "run", *more]


class Launch:
    """Workers as a launcher starts them, but each with everything imported.

    Args:
        nursery: Starts them.
        folder: Where they run, and where what they say is written.
        arguments: Of each.
        workers: How many there are.
        ranks: Those to start; all of them by default.
        restarts: How often they have been started before.
        fault: What goes wrong in one of them.
        hosts: The network host of each; by default this machine.
        masters: By what address each knows the host of the first.
        options: Given to the nursery.
    """

    def __init__(
        self, nursery, folder, arguments=(), *, workers=2, ranks=None, restarts=0, fault=None, hosts=None, masters=None,
        **options,
    ):  # fmt: skip
        self._hosts = hosts or [None] * workers
        self._masters = masters or [hosts[0].address if hosts else "127.0.0.1"] * workers
        self._environment = {"WORLD_SIZE": str(workers), "MASTER_PORT": str(free_port())}
        self._environment |= {"TORCHELASTIC_RESTART_COUNT": str(restarts)}
        self._environment[federations.FAULT] = json.dumps(fault or {})
        self._nursery, self._folder, self._arguments, self._options = nursery, folder, arguments, options
        self.children = []
        for rank in range(workers) if ranks is None else ranks:
            self.start(rank)

    def start(self, rank):
        """Starts one worker."""
        host = self._hosts[rank]
        place = {
            "RANK": rank,
            "LOCAL_RANK": self._hosts[:rank].count(host),
            "LOCAL_WORLD_SIZE": self._hosts.count(host),
        }
        environment = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": self._masters[rank]}
        options = {"run": "federations:command"} | self._options
        self.children.append(
            self._nursery.start(
                output=self._folder / f"said-{rank}", arguments=self._arguments, cwd=self._folder,
                environment=self._environment | environment, host=host and host.name, **options,
            )
        )  # fmt: skip

    def codes(self, seconds=60):
        """Waits for all; returns their exit codes."""
        return [child.wait(seconds) for child in self.children]

    @property
    def told(self):
        """What each has written."""
        return [child.told for child in self.children]


def free_port():
    """Returns a port that is free on this machine at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def one_process(nursery, folder, *more):
    """Runs the experiment in one process without a launcher; returns its exit code and what it has written."""
    child = nursery.start("federations:command", output=folder / "said", arguments=federate(folder, *more), cwd=folder)
    return child.wait(), child.told


def wait_for(what, seconds=60):
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_lines(run, count):
    """Waits until a run has begun, and so many of its rounds are done."""
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= count)


def records(run):
    """Returns what a run has recorded of its rounds, without the times."""
    return [json.loads(line) for line in timeless(run / "metrics.jsonl")]


def assert_same(folder, reference, atol):
    """Asserts that two runs ended with the same model, and say the same of every round."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, reference))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol)
    for line, expected in zip(records(folder), records(reference), strict=True):
        assert list(line) == list(expected)
        assert line.pop("failed") == expected.pop("failed")
        assert line == pytest.approx(expected, rel=0, abs=10 * atol)


def said(launch):
    """What each worker has told the user of an end, beside its progress."""
    return [ERROR.findall(told) for told in launch.told]


def assert_clean(launch):
    """No worker but the first has said anything, and nothing has ended in a way of its own."""
    for told in launch.told:
        assert "terminate called" not in told
        assert "Exception ignored" not in told
    assert launch.told[1:] == [""] * (len(launch.children) - 1)
