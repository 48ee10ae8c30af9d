"""The process engine as a user's program meets it: threads, signals, and an end that nobody announced."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from process_table import alive, children, eventually

TIMEOUT = 120


@contextlib.contextmanager
def started(*arguments, **options):
    """A Python process in a session of its own, which is ended in any case."""
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    run = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    with run:
        try:
            yield run
        finally:
            run.kill()


THREADS = """
from functools import partial
import numpy as np, torch
from torch import nn
import shoal
from support import assert_equal

torch.set_num_threads(2)
a = torch.randn(1500, 1500)
a @ a  # starts the threads of this process
data = shoal.data.ArrayDataset(np.random.default_rng(0).normal(size=(600, 512)).astype("float32"), np.arange(600) % 3)
clients = shoal.data.partition(data, shoal.data.IID(clients=3))
learner = shoal.TorchLearner(
    lambda: nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 3)),
    loss=nn.functional.cross_entropy,
    optimizer=partial(torch.optim.SGD, lr=0.1),
    batch_size=200,
    devices=shoal.Devices(threads=2),
)
expected = shoal.federate(learner, clients, rounds=2, engine="sequential")
for settings in ({"max_concurrent": 1}, {"max_concurrent": 1, "clients_per_process": 3}):
    engine = shoal.engines.ProcessEngine(client_timeout=30, **settings)
    found = shoal.federate(learner, clients, rounds=2, engine=engine)
    assert_equal(found.params, expected.params)
print("equal")
"""


def test_children_with_two_threads_train_though_the_parent_had_run_some():
    with started("-Werror", "-c", THREADS) as run:
        assert run.communicate(timeout=TIMEOUT) == ("equal\n", "")


RUN = """
import os, sys, time
import torch, shoal
from support import Failing, learner, population

def act(inputs):
    os.write(1, b"training\\n")  # as one piece: two children write
    time.sleep(float(sys.argv[1]))

engine = shoal.engines.ProcessEngine(max_concurrent=2)
ours = learner(lambda: Failing(act), steps=1, devices=shoal.Devices(threads=1))
shoal.federate(ours, population(), rounds=1000, engine=engine, run_dir=sys.argv[2], tensorboard=False)
"""


@pytest.fixture
def training(tmp_path):
    """A run whose two children train for ever: the run, its server and the children."""
    with started("-Werror", "-c", RUN, 50, tmp_path / "run") as run:
        for _ in range(2):
            assert run.stdout.readline() == "training\n"
        (server,) = children(run.pid)
        yield run, server, children(server)


@pytest.mark.parametrize("victim", ["run", "server"])
def test_whoever_is_killed_nothing_is_left(victim, training):
    run, server, pids = training
    assert len(pids) == 2
    os.kill(run.pid if victim == "run" else server, signal.SIGKILL)
    assert eventually(lambda: not any(alive(pid) for pid in (run.pid, server, *pids)))
    if victim == "server":
        assert "EngineError: the fork server of engine 'process' was killed by SIGKILL" in run.stderr.read()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_the_terminal_is_the_runs_to_handle(stop, training):
    run, server, pids = training
    asked = time.monotonic()
    os.killpg(run.pid, stop)
    _, told = run.communicate(timeout=30)
    assert time.monotonic() - asked < 10
    assert eventually(lambda: not any(alive(pid) for pid in (server, *pids)))
    if stop == signal.SIGINT:
        assert "RunInterrupted: stopped after round 0; the state is saved in" in told
    assert "fork_server" not in told


def test_the_command_ends_on_ctrl_c_with_the_way_to_go_on(tmp_path):
    words = ["demo", "--rounds", "1000", "--cohort", "4", "--engine", "process", "--max-concurrent", "2"]
    with started("-m", "shoal", *words, cwd=tmp_path) as run:
        for line in run.stdout:
            if line.startswith("round 2/"):
                break
        (server,) = children(run.pid)
        os.killpg(run.pid, signal.SIGINT)
        _, told = run.communicate(timeout=30)
    assert run.returncode == 130, told
    assert eventually(lambda: not alive(server))
    assert f"to go on: shoal {' '.join(words)} --run-dir runs/digits-0001 --resume" in told
    done = int(re.search(r"stopped after round (\d+); the state is saved", told)[1])
    assert (tmp_path / f"runs/digits-0001/checkpoints/round-{done:06d}").exists()


FAILING = """
import shoal
from support import Failing, learner, population

def act(inputs):
    raise ZeroDivisionError("the user's own loss")

def experiment():
    return shoal.Experiment(learner=learner(lambda: Failing(act)), clients=population(), rounds=2)
"""


def test_the_command_shows_the_traceback_of_a_childs_failure(tmp_path):
    (tmp_path / "mine.py").write_text(FAILING)
    words = ["federate", "mine.py", "--engine", "process", "--set", "engine.clients_per_process=2"]
    with started("-m", "shoal", *words, cwd=tmp_path) as run:
        _, told = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 1
    assert "In the process of client 0:" in told
    assert 'mine.py", line' in told
    last = told.splitlines()[-1]
    assert last.startswith("shoal: error: client 0 failed in round 1: ZeroDivisionError: the user's own loss")
