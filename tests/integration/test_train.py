"""``shoal train`` as a user meets it: real ranks, killed at random moments, on one machine and on several."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from launches import free_port, wait_for
from process_table import children
from shoal.cli.main import main
from support import timeless

EXPERIMENT = Path(__file__).parent.parent / "trainings.py"
TIMEOUT = 120
SOON = 30.0
"""Seconds in which a command ends after a rank has, as promised."""


def command(*arguments):
    return [sys.executable, "-m", "shoal", "train", *map(str, arguments)]


def environment():
    kept = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    return kept | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}


def train(*arguments, cwd):
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )


class Running:
    """A command under way; its processes are gone at the end of the context.

    Args:
        arguments: Of the command.
        cwd: Where it runs, and what it says is written.
        nursery: Forks it and its ranks; None to start them as a user does, which takes seconds for each.
    """

    def __init__(self, *arguments, cwd, nursery=None):
        self._said = cwd / "said"
        if nursery is not None:
            words = ["train", *arguments]
            child = nursery.start("forked:command", output=self._said, arguments=words, cwd=cwd)
            self.pid, self._wait = child.pid, child.wait
            return
        with self._said.open("w") as said:
            process = subprocess.Popen(
                command(*arguments), cwd=cwd, env=environment(), stdout=said, stderr=said, process_group=0
            )
        self.pid, self._wait = process.pid, process.wait

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [*self.ranks(), self.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._wait(10)

    def ranks(self):
        """The ranks' processes."""
        return children(self.pid)

    def send(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """Returns the exit code, what was said, and after how many seconds."""
        started = time.monotonic()
        code = self._wait(TIMEOUT)
        return code, self._said.read_text(), time.monotonic() - started


@pytest.fixture
def finish(nursery):
    """Runs the command to its end in a process that is forked; fails unless it succeeds."""

    def finish(*arguments, cwd):
        with Running(*arguments, cwd=cwd, nursery=nursery) as running:
            code, told, _ = running.wait()
        assert code == 0, told

    return finish


def steps(run):
    """The steps that there are checkpoints of."""
    return sorted(int(path.name.partition("-")[2]) for path in (run / "checkpoints").glob("step-*"))


def furthest(a, b):
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    return max(np.abs(one[name] - other[name]).max() for name in one)


def same_run(a, b):
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert timeless(a / "metrics.jsonl") == timeless(b / "metrics.jsonl")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted training on two ranks."""
    folder = tmp_path_factory.mktemp("reference")
    done = train(EXPERIMENT, "--devices", 2, "--run-dir", "run", "--checkpoint-every", 5, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_training_says_what_it_does_and_leaves_a_run_folder(reference):
    folder, done = reference
    assert "batch: 32 examples a device × 2 devices = 64 a step (ddp, fp32)" in done.stdout
    assert re.findall(
        r"^epoch (\d)/3 · train loss [\d.]+ · accuracy [\d.]+ · loss [\d.]+ · lr \S+ ·", done.stdout, re.M
    ) == [
        "1",
        "2",
        "3",
    ]
    assert done.stderr == ""
    names = {path.name for path in (folder / "run").iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "model.safetensors", "report.html", "checkpoints", "classes.json"}
    assert steps(folder / "run")[-1] == 69


def test_two_ranks_equal_one_device_with_the_same_batch(reference, finish, tmp_path):
    folder, _ = reference
    finish(EXPERIMENT, "--batch-size", 64, "--run-dir", "run", cwd=tmp_path)
    assert furthest(folder / "run", tmp_path / "run") < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_command_soon_and_resume_equals_no_interruption(reference, finish, tmp_path, rank):
    # Not forked: of ranks that are, torch's launcher tells one that has ended, and not the first.
    folder, _ = reference
    chance = random.Random(rank)
    arguments = (EXPERIMENT, "--devices", 2, "--run-dir", "run", "--checkpoint-every", 5)
    with Running(*arguments, "--set", "pause=0.05", cwd=tmp_path) as running:
        until = chance.randrange(1, 40)
        wait_for(lambda: max(steps(tmp_path / "run"), default=0) >= until, TIMEOUT)
        time.sleep(chance.random() * 0.3)
        os.kill(running.ranks()[rank], signal.SIGKILL)
        code, told, seconds = running.wait()
    assert code == 1
    assert seconds < SOON
    assert re.search(rf"^shoal: error: rank {rank} \(process \d+\) was ended by SIGKILL$", told, re.M), told
    assert "Traceback" not in told
    finish(*arguments, "--resume", cwd=tmp_path)
    same_run(folder / "run", tmp_path / "run")


@pytest.mark.slow
def test_a_rank_that_raises_is_named_with_its_last_lines(tmp_path):
    done = train(EXPERIMENT, "--devices", 2, "--set", "fail_at=7", cwd=tmp_path)
    assert done.returncode == 1
    assert "ArithmeticError: rank 1 cannot go on" in done.stderr
    assert re.search(r"shoal: error: rank 1 \(process \d+\) ended with exit code 1$", done.stderr.strip())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "devices", "forked"),
    [
        (signal.SIGINT, 2, False),
        (signal.SIGTERM, 2, True),
        (signal.SIGINT, 1, True),
        (signal.SIGTERM, 1, True),
    ],
)
def test_a_signal_ends_all_ranks_and_the_run_goes_on(reference, nursery, finish, tmp_path, number, devices, forked):
    folder, _ = reference
    arguments = (
        EXPERIMENT,
        "--batch-size",
        64 // devices,
        "--devices",
        devices,
        "--run-dir",
        "run",
        "--checkpoint-every",
        5,
    )
    with Running(*arguments, "--set", "pause=0.05", cwd=tmp_path, nursery=nursery if forked else None) as running:
        wait_for(lambda: steps(tmp_path / "run"), TIMEOUT)
        ranks = running.ranks()
        running.send(number)
        code, told, seconds = running.wait()
        assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    assert code == (130 if number == signal.SIGINT else 143)
    assert seconds < SOON
    assert re.search(r"stopped after step \d+; .*to go on: shoal train .* --resume", told), told
    finish(*arguments, "--resume", cwd=tmp_path)
    assert furthest(folder / "run", tmp_path / "run") < 1e-6


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(tmp_path):
    with Running(EXPERIMENT, "--devices", 2, "--set", "pause=0.2", "--run-dir", "run", cwd=tmp_path) as running:
        wait_for((tmp_path / "run" / "config.json").exists, TIMEOUT)
        ranks = running.ranks()
        assert len(ranks) == 2
        running.send(signal.SIGKILL)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), SOON)


@pytest.mark.slow
def test_two_trainings_at_once_do_not_meet(reference, nursery, tmp_path):
    folder, _ = reference
    arguments = (EXPERIMENT, "--devices", 2)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        Running(*arguments, cwd=tmp_path / "a", nursery=nursery) as first,
        Running(*arguments, cwd=tmp_path / "b", nursery=nursery) as second,
    ):
        for running in (first, second):
            code, told, _ = running.wait()
            assert code == 0, told
    for name in ("a", "b"):
        assert furthest(folder / "run", tmp_path / name / "runs" / "trainings-0001") < 1e-6


@pytest.mark.slow
def test_two_nodes_equal_one(reference, nursery, tmp_path):
    folder, _ = reference
    place = f"127.0.0.1:{free_port()}"
    arguments = (EXPERIMENT, "--nodes", 2, "--rendezvous", place, "--run-dir", tmp_path / "run")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        Running(*arguments, "--node-rank", 0, cwd=tmp_path / "a", nursery=nursery) as first,
        Running(*arguments, "--node-rank", 1, cwd=tmp_path / "b", nursery=nursery) as second,
    ):
        codes = [first.wait()[0], second.wait()[0]]
    assert codes == [0, 0]
    assert furthest(folder / "run", tmp_path / "run") < 1e-6


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["digits", "--devices", 2, "--strategy", "single"], "strategy 'single' uses one device, not 2"),
        (["digits", "--devices", 0], "the number of devices must be ≥ 1, not 0"),
        (["digits", "--strategy", "ddp", "--accelerator", "cpu"], "say how many with --devices"),
        (["digits", "--strategy", "dp", "--accelerator", "cpu"], "on a CPU use 'ddp'"),
        (["digits", "--strategy", "pp"], "unknown strategy 'pp'"),
        (["digits", "--ids", "0,x"], "--ids takes numbers such as 0,1,3"),
        (["digits", "--precision", "fp16", "--accelerator", "cpu"], "fp16 is for CUDA devices"),
        (["digits", "--nodes", 2], "--rendezvous HOST:PORT, not None"),
        (["digits", "--node-rank", 1], "say how many with --nodes"),
        (["digits", "--nodes", 2, "--node-rank", 2, "--rendezvous", "a:1"], "--node-rank from 0 to 1"),
        (["digits", "--resume"], "name it with --run-dir"),
        (["digits", "--batch-size", 0], "batch_size must be at least 1"),
        (["digits", "--epochs", 0], "epochs must be a whole number ≥ 1"),
        (["digits", "--set", "learner.lerning=1"], "unknown setting 'learner.lerning'"),
        (["digit"], "unknown experiment 'digit'; did you mean 'digits'"),
        (["none.py"], "there is no experiment file none.py"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch, capfd, arguments, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shoal", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capfd.readouterr().err
    assert told in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("late", "forked"), [(0, True), (1, True), (None, False)])
def test_a_refusal_of_the_ranks_is_one_line_too(nursery, tmp_path, late, forked):
    (tmp_path / "late.py").write_text(
        f"""
import os, time
from shoal.experiments import load_training
def training():
    time.sleep(2 * (os.environ.get("RANK") == "{late}"))
    return load_training("digits")()
"""
    )
    arguments = ("late.py", "--devices", 2, "--accelerator", "cpu", "--set", "learner.clip_norm=-1")
    with Running(*arguments, cwd=tmp_path, nursery=nursery if forked else None) as running:
        code, told, _ = running.wait()
    assert code == 2, told
    said = "shoal: error: clip_norm must be > 0, not -1.0; None means no limit"
    # Whichever comes to it first, or both do before either is ended: one of them is heard, once.
    assert told.strip() in [f"rank {rank}: {said}" for rank in (0, 1)]
    assert not list((tmp_path / "runs").iterdir())


def test_another_batch_is_refused_at_a_resume(reference, nursery):
    folder, _ = reference
    arguments = (EXPERIMENT, "--batch-size", 16, "--run-dir", "run", "--resume")
    with Running(*arguments, cwd=folder, nursery=nursery) as running:
        code, told, _ = running.wait()
    assert code == 2, told
    assert "effective_batch" in told
