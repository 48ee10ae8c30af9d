"""Several workers share each cohort: real processes, their results, their ends, and what they say."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import federations
from nursery import Nursery
from support import timeless

TESTS = Path(__file__).parents[1]
EXPERIMENT = TESTS / "federations.py"


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


class Launch:
    """Workers as a launcher starts them."""

    def __init__(
        self, nursery, folder, arguments=(), *, workers=2, fault=None, run="federations:command", settings=None, first=0
    ):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        environment = {"WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(port), federations.FAULT: json.dumps(fault or {})}
        self.began = time.monotonic()
        self.children = [
            nursery.start(
                run, output=folder / f"said-{rank}", arguments=arguments, cwd=folder, settings=settings,
                environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(first, workers)
        ]  # fmt: skip

    def codes(self, seconds=60):
        """Waits for all; returns their exit codes."""
        return [child.wait(seconds) for child in self.children]

    @property
    def told(self):
        return [child.told for child in self.children]


def federate(folder, *more):
    return ["federate", EXPERIMENT, "--run-dir", folder / "run", *more]


@pytest.fixture(scope="module")
def alone(nursery, tmp_path_factory):
    """The run of one process without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    child = nursery.start("federations:command", output=folder / "said", arguments=federate(folder), cwd=folder)
    assert child.wait() == 0, child.told
    return folder / "run"


def assert_same(folder, reference, atol):
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, reference))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol)
    ours, theirs = (timeless(path / "metrics.jsonl") for path in (folder, reference))
    for line, expected in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        assert list(line) == list(expected)
        assert line.pop("failed") == expected.pop("failed")
        assert line == pytest.approx(expected, rel=0, abs=10 * atol)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_end_where_one_process_does(nursery, alone, tmp_path, workers):
    launch = Launch(nursery, tmp_path, federate(tmp_path, "--engine", "distributed"), workers=workers)
    assert launch.codes() == [0] * workers, launch.told
    assert_same(tmp_path / "run", alone, atol=0 if workers == 1 else 1e-6)
    assert launch.told[1:] == [""] * (workers - 1)


PLACES = {
    "meeting": ("shoal.engines.workers:Reception.receive", "shoal.engines.workers:call_on", 1),
    "joining": ("torch.distributed:init_process_group", "", 1),
    "agreeing": ("shoal.engines:Workers.agree", "", 1),
    "opening the folder": ("shoal.federation.run:RunFolder.open", None, 1),
    "the first state": ("shoal.engines:Workers.copy_leader", "", 1),
    "training": ("federations:Data.take", "", 9),
    "the sum": ("torch.distributed:all_reduce", "", 3),
    "measuring": ("shoal.learners.torch:TorchLearner.evaluate", None, 4),
    "saving": ("shoal.runs.checkpoints:Checkpoints.save", None, 3),
    "delivering": ("shoal.federation.storage:RunStorage.deliver", None, 1),
    "the last copy": ("shoal.engines:Workers.copy_leader", "", 2),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_worker_ends_the_others_do(nursery, alone, tmp_path, place, rank, number, when):
    where = PLACES[place][rank] if PLACES[place][rank] != "" else PLACES[place][0]
    if where is None:
        pytest.skip("only worker 0 does that")
    fault = {"rank": rank, "where": where, "call": PLACES[place][2], "after": when == "after", "signal": number}
    launch = Launch(nursery, tmp_path, federate(tmp_path, "--set", "checkpoint_every=2"), workers=3, fault=fault)
    t0 = time.monotonic()
    codes = launch.codes(40)
    print(place, rank, number, when, codes, round(time.monotonic() - t0, 2))
    for r, told in enumerate(launch.told):
        print(f"--- {r}:", told)
