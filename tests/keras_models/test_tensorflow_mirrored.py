"""The example of sites with TensorFlow's MirroredStrategy, as a user starts it, on data that are learnt at once."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import pictures
from process_table import alive, children, eventually
from shoal.federation.job_files import own_part

pytest.importorskip("tensorflow")

pytestmark = pytest.mark.timeout(600)  # a test may wait for two commands

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_gpu" / "tensorflow_mirrored"
ROUNDS = 6
QUICK = ("--batch_size", 4, "--lr", 0.01, "--accelerator", "cpu")
LONGEST = 240.0
"""Seconds in which any of the commands must have ended."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder in the format of CIFAR-10, with few images."""
    return pictures.write_cifar10(tmp_path_factory.mktemp("images"))


class Command:
    """A command in a process of its own, with what it and its sites have written and taken.

    Args:
        folder: Where it runs.
        words: The command.
    """

    def __init__(self, folder, *words):
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self._output = folder / f"output-{time.monotonic_ns()}"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [*map(str, words)], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self._descent = set()
        self.memory = {}
        """Of each site's process, after each number of rounds: the last seen of its resident memory, in MB."""

    @property
    def said(self):
        return self._output.read_text()

    def follow(self, run_dir, until=None):
        """Watches a run to its end, or until so many rounds are done."""
        deadline = time.monotonic() + LONGEST
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self.said
            self._look(rounds := len(measured(run_dir)))
            if until is not None and rounds >= until:
                return
            time.sleep(0.1)

    def interrupt(self):
        self._process.send_signal(signal.SIGINT)

    def ended(self, code=0):
        """Waits for the end, after which nothing of it is there; returns what it has written."""
        assert self._process.wait(LONGEST) == code, self.said
        assert eventually(lambda: not any(map(alive, self._descent)), 5)
        return self.said

    def stop(self):
        """Ends what a test that has failed has left: its sites end by themselves when their server is gone."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)

    def _look(self, rounds):
        for pid in family(self._process.pid):
            self._descent.add(pid)
            try:
                script = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[2:3]
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # it has ended meanwhile
                continue
            if script == [str(EXAMPLE / "client.py")] and (found := re.search(r"VmRSS:\s*(\d+)", status)):
                self.memory.setdefault(pid, {})[rounds] = int(found[1]) / 1024


def family(pid):
    """Returns all processes that descend from one."""
    return [one for child in children(pid) for one in (child, *family(child))]


def measured(run_dir):
    """Returns what was measured of the global model after each round."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{name: row[name] for name in ("accuracy", "loss", "train_loss")} for row in map(json.loads, lines)]


@pytest.fixture
def start(tmp_path):
    """Starts commands, and sees to it that they end."""
    started = []

    def start(*words, folder=tmp_path):
        started.append(Command(folder, *words))
        return started[-1]

    yield start
    for command in started:
        command.stop()


@pytest.fixture(scope="module")
def words(images):
    """The job of all tests: two sites with two logical devices each."""
    return (sys.executable, EXAMPLE / "job.py", "--num_rounds", ROUNDS, "--data_dir", images, *QUICK)


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The job, run to its end; its folder, and the command."""
    folder = tmp_path_factory.mktemp("whole")
    command = Command(folder, *words, "--use_tracking")
    try:
        run_dir = folder / "runs" / "tensorflow_mirrored"
        command.follow(run_dir)
        command.ended()
    finally:
        command.stop()
    return run_dir, command


@pytest.mark.slow
def test_a_job_of_two_sites_with_two_replicas_each(whole):
    run_dir, command = whole
    assert "the images are those of cifar10\n" in command.said
    for part in (1, 2):
        assert f"site-{part}: cifar10: 200 of 400 images to train on, 40 to test with\n" in command.said
    accuracy = [row["accuracy"] for row in measured(run_dir)]
    assert len(accuracy) == ROUNDS
    assert accuracy[0] < accuracy[-1]
    assert accuracy[-1] > 0.5
    assert (run_dir / "report.html").is_file()
    assert list((run_dir / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_memory_stays_what_it_was_after_three_rounds(whole):
    _, command = whole
    assert len(command.memory) == 2  # one process a site
    for seen in command.memory.values():
        early, late = (
            max(seen[rounds] for rounds in those if rounds in seen) for those in ((2, 3), (ROUNDS - 1, ROUNDS))
        )
        assert late < 1.04 * early


@pytest.mark.slow
def test_interrupted_and_resumed_it_ends_as_if_it_had_not_been(whole, words, start, tmp_path):
    run_dir = tmp_path / "runs" / "tensorflow_mirrored"
    command = start(*words, "--use_tracking")
    command.follow(run_dir, until=2)
    command.interrupt()
    assert "to go on: the same command with --resume" in command.ended(code=130)
    done = len(measured(run_dir))
    assert 2 <= done < ROUNDS
    command = start(*words, "--use_tracking", "--resume")
    command.follow(run_dir)
    assert f"round {done}/{ROUNDS} " not in command.ended()
    assert_equal(run_dir, whole[0])


@pytest.mark.slow
def test_an_exported_job_gives_the_same_elsewhere(whole, words, start, tmp_path):
    assert "run it with: shoal federate jobs/tensorflow_mirrored\n" in start(*words, "--export_config").ended()
    assert not (tmp_path / "runs").exists()
    moved = (tmp_path / "jobs" / "tensorflow_mirrored").rename(tmp_path / "moved")
    assert {"client.py", "data.py", "model.py"} <= {path.name for path in own_part(moved).iterdir()}
    command = start("shoal", "federate", moved, "--rounds", 2, "--run-dir", tmp_path / "run")
    command.follow(tmp_path / "run")
    command.ended()
    assert_equal(tmp_path / "run", whole[0], rounds=2)


@pytest.mark.slow
def test_at_real_sites_it_gives_the_same(whole, words, start, tmp_path):
    pytest.importorskip("nvflare")
    from shoal.deploy.nvflare_submit import simulate

    start(*words, "--export_config").ended()
    job = tmp_path / "jobs" / "tensorflow_mirrored"
    assert_equal(simulate(job, tmp_path / "workspace", ["site-1", "site-2"], show=print, within=280), whole[0])


def assert_equal(run_dir, other, rounds=ROUNDS):
    """Two runs have measured the same in their first rounds and, if these are all, ended with the same model."""
    ours, theirs = measured(run_dir), measured(other)[:rounds]
    assert len(ours) == rounds
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(expected, abs=1e-5)
    if rounds == ROUNDS:
        arrays, expected = (load_file(folder / "model.safetensors") for folder in (run_dir, other))
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            np.testing.assert_allclose(array, expected[name], atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.slow
def test_the_script_runs_alone_and_without_torch(images, start):
    alone = "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv[:2] = ['client.py']; "
    alone += "runpy.run_path(sys.path[0] + '/client.py', run_name='__main__'); print('torch' in sys.modules)"
    words = ("--data_dir", images, "--images", 84, "--batch_size", 32, "--devices", 2, "--accelerator", "cpu")
    said = start(sys.executable, "-c", alone, EXAMPLE, *words).ended()
    assert "cifar10: 84 of 400 images to train on, 80 to test with\n" in said
    assert re.search(r"shoal: the task to train in round 1 alone, 84 examples: accuracy 0\.\d+, loss \d\.\d+\n", said)
    assert said.endswith("False\n")


def test_gpus_that_are_not_there_are_not_swapped_for_the_cpu(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    for name in ("data", "model"):  # which the other examples have, too
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    mirrored = runpy.run_path(str(EXAMPLE / "client.py"))["mirrored"]
    with pytest.raises(SystemExit, match=r"--devices 64, and TensorFlow sees \d+ GPUs: --accelerator cpu uses none"):
        mirrored(64, "cuda")


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_the_model_takes_the_images_of_each_data_set(shape):
    model = runpy.run_path(str(EXAMPLE / "model.py"))["make_net"]()
    assert model.count_params() == 62_006
    pixels = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)
    scores, same = (np.array(model(batch[None])) for batch in (pixels, np.broadcast_to(pixels, (*shape[:2], 3))))
    assert scores.shape == (1, 10)
    np.testing.assert_array_equal(scores, same)


def test_data_that_are_there_are_not_fetched(images, start):
    assert start(EXAMPLE / "prepare_data.sh", images).ended() == f"CIFAR-10 is in {images}\n"
