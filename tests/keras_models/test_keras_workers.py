"""One Keras model on several processes: ``multiworker`` under ``shoal train``, with TF_CONFIG, and on two hosts."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("tensorflow")

from hosts import NEEDED, linked_hosts, why_not
from shoal.devices import tensorflow_config
from shoal.processes.ports import held_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TESTS = Path(__file__).parents[1]
WORKERS = ("--strategy", "multiworker", "--accelerator", "cpu")


@contextlib.contextmanager
def started(folder, *words, host=None, **environment):
    """Yields ``shoal train`` of the tests' training, started in a session of its own, which ends with the context."""
    command = [sys.executable, "-m", "shoal", "train", str(TESTS / "keras_training_file.py"), "--run-dir", str(folder)]
    prefix = [] if host is None else ["ip", "netns", "exec", host.name]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [*prefix, *command, *words],
        env=os.environ | {"PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in (*ranks_of(process).values(), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=30)


def ended(process, within=120):
    """Waits for its end; returns the exit code and what it has said."""
    told, _ = process.communicate(timeout=within)
    return process.returncode, told


def train(folder, *words, **environment):
    """Trains to the end; returns the model's arrays and the records of the epochs."""
    with started(folder, *words, **environment) as process:
        code, told = ended(process)
    assert code == 0, told
    return result_of(folder)


def result_of(folder):
    """Returns the last model of a run, and the records of its epochs."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "model.safetensors"), records


def assert_equal(one, other, atol):
    """Asserts that two runs have come to the same."""
    for name, array in one[0].items():
        np.testing.assert_allclose(other[0][name], array, atol=atol, rtol=0)
    assert len(one[1]) == len(other[1])
    for mine, theirs in zip(one[1], other[1], strict=True):
        for name in ("train_loss", "train_accuracy", "loss", "accuracy", "learning_rate"):
            assert mine[name] == pytest.approx(theirs[name], abs=max(atol, 1e-12))


def children(pid):
    """Returns the processes that one has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, timeout=10).stdout
    return [int(word) for word in found.split()]


def ranks_of(process):
    """Returns the processes of the ranks."""
    found = {}
    for pid in children(process.pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): pid for word in words if word.startswith(b"RANK=")}
    return found


def wait_for_epochs(folder, count, process):
    """Waits until so many epochs are recorded."""
    until = time.monotonic() + 90
    lines = folder / "metrics.jsonl"
    while not lines.exists() or len(lines.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device makes of it."""
    return train(tmp_path_factory.mktemp("alone") / "run", "--accelerator", "cpu", "--batch-size", "16")


def test_two_workers_are_one_device_with_their_batch_and_two_runs_at_once_do_not_collide(alone, tmp_path):
    with (
        started(tmp_path / "a", *WORKERS, "--devices", "2") as one,
        started(tmp_path / "b", *WORKERS, "--devices", "2") as other,
    ):
        for process in (one, other):
            code, told = ended(process)
            assert code == 0, told
    assert len(alone[1]) == 5
    assert alone[1][-1]["step"] == 25
    assert_equal(alone, result_of(tmp_path / "a"), 1e-5)
    assert_equal(result_of(tmp_path / "b"), result_of(tmp_path / "a"), 0)


LONG = (*WORKERS, "--devices", "2", "--epochs", "20", "--set", "calls=true")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a long training comes to that nothing happens to, with callbacks of which one writes."""
    found = train(tmp_path_factory.mktemp("whole") / "run", *LONG)
    assert found[1][0]["learning_rate"] > 8 * found[1][-1]["learning_rate"] > 0
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed_ends_the_command_which_resumes_exactly(tmp_path, whole, rank):
    folder = tmp_path / "run"
    with started(folder, *LONG) as process:
        wait_for_epochs(folder, 2, process)
        time.sleep(random.random())
        os.kill(ranks_of(process)[rank], signal.SIGKILL)
        died = time.monotonic()
        code, told = ended(process, within=60)
    assert time.monotonic() - died < 60
    assert code == 1
    assert f"shoal: error: rank {rank} (process " in told.splitlines()[-1]
    assert "was ended by SIGKILL" in told.splitlines()[-1]
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    assert done < 20
    assert_equal(whole, train(folder, *LONG, "--resume"), 0)


def test_one_worker_is_a_group_of_one(alone, tmp_path):
    assert_equal(alone, train(tmp_path / "run", *WORKERS, "--devices", "1", "--batch-size", "16"), 1e-5)


def by_hand(ports, index):
    """Returns what tells a worker its place."""
    workers = [f"127.0.0.1:{port}" for port in ports]
    return {"TF_CONFIG": tensorflow_config(workers, index)}


def test_workers_started_by_hand_are_those_of_tf_config(alone, tmp_path):
    with held_ports(2) as ports:  # free again when the workers begin to listen
        pass
    with (
        started(tmp_path / "run", *WORKERS, **by_hand(ports, 0)) as chief,
        started(tmp_path / "run", *WORKERS, **by_hand(ports, 1)) as worker,
    ):
        for process in (worker, chief):
            code, told = ended(process)
            assert code == 0, told
            assert ("epoch 5/5" in told) == (process is chief)
    assert_equal(alone, result_of(tmp_path / "run"), 1e-5)


REFUSED = {
    "no launcher": (
        ["--strategy", "multiworker"],
        {},
        "--strategy multiworker has a process for each device: say how many with --devices",
    ),
    "no json": (WORKERS, {"TF_CONFIG": "{"}, "TF_CONFIG must be JSON such as"),
    "a server of parameters": (
        WORKERS,
        {"TF_CONFIG": '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 0}}'},
        "TF_CONFIG must name a chief and workers alone",
    ),
    "fewer workers": (
        [*WORKERS, "--devices", "3"],
        {"TF_CONFIG": '{"cluster": {"worker": ["127.0.0.1:0"]}, "task": {"type": "worker", "index": 0}}'},
        "3 devices were asked for, and the workers have 1 together",
    ),
    "torch's": (["--strategy", "ddp", "--devices", "2", "--accelerator", "cpu"], {}, "strategy 'ddp' is torch's"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, kind):
    words, environment, told = REFUSED[kind]
    with started(tmp_path / "run", *words, **environment) as process:
        code, said = ended(process)
    assert code == 2, said
    [line] = [line for line in said.splitlines() if "shoal: error" in line]
    assert told in line
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def hosts():
    """Two hosts that reach each other."""
    if reason := why_not():
        pytest.skip(f"there are no network namespaces here: {reason}")
    with linked_hosts() as both:
        yield both


class TestHosts:
    pytestmark = NEEDED

    def launch(self, stack, folder, hosts, *words):
        """Starts the command on both hosts."""
        meet = ("--nodes", "2", "--rendezvous", f"{hosts[0].address}:29417", "--devices", "1")
        return [
            stack.enter_context(started(folder, *WORKERS, *meet, "--node-rank", str(rank), *words, host=host))
            for rank, host in enumerate(hosts)
        ]

    def test_two_workers_on_two_hosts_are_one_device(self, alone, tmp_path, hosts):
        with contextlib.ExitStack() as stack:
            for process in self.launch(stack, tmp_path / "run", hosts):
                code, told = ended(process)
                assert code == 0, told
        assert_equal(alone, result_of(tmp_path / "run"), 1e-5)

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_host_that_dies_ends_the_other_and_the_run_goes_on_later(self, whole, tmp_path, hosts, lost):
        folder = tmp_path / "run"
        with contextlib.ExitStack() as stack:
            both = self.launch(stack, folder, hosts, *LONG[-4:])
            wait_for_epochs(folder, 2, both[0])
            hosts[lost].kill()
            code, told = ended(both[1 - lost], within=60)
        assert code == 1
        assert "another rank is gone" in told or "stopped after step" in told, told
        done = len((folder / "metrics.jsonl").read_text().splitlines())
        assert done < 20
        with contextlib.ExitStack() as stack:
            for process in self.launch(stack, folder, hosts, *LONG[-4:], "--resume"):
                code, told = ended(process)
                assert code == 0, told
        assert_equal(whole, result_of(folder), 0)
