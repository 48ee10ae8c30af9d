"""A run that is killed and resumed ends like one that never was."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from shoal.errors import RunFolderError
from support import run_in_folder, timeless

ROUNDS = 40
KILLS = 24


@pytest.fixture(scope="module")
def spawn():
    """Starts runs in children of a process that has everything imported, so that a child costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support", "torch._dynamo"])

    def start(run_dir: Path, *, resume: bool):
        child = context.Process(
            target=run_in_folder, args=(str(run_dir),), kwargs={"resume": resume, "rounds": ROUNDS}, daemon=True
        )
        child.start()
        return child

    yield start
    for child in multiprocessing.active_children():
        child.kill()
        child.join(10)


def finish(child):
    child.join(120)
    assert child.exitcode == 0


@pytest.fixture(scope="module")
def uninterrupted(spawn, tmp_path_factory):
    """A whole run."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    finish(spawn(folder, resume=False))
    return folder


def assert_same_run(folder, reference):
    assert timeless(folder / "metrics.jsonl") == timeless(reference / "metrics.jsonl")
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    last = f"checkpoints/round-{ROUNDS:06d}/state.safetensors"
    assert (folder / last).read_bytes() == (reference / last).read_bytes()


def lines(path):
    """Returns how many lines a file has; 0 without one."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def strike(child, metrics, chance):
    """Kills a run as it starts, or a moment after it has told of a few rounds more, unless it is complete before."""
    more = chance.randint(0, 10)
    wanted = lines(metrics) + more
    while more and lines(metrics) < wanted and child.is_alive():
        time.sleep(0.001)
    child.join(chance.uniform(0, 0.02 if more else 0.5))
    child.kill()
    child.join(120)


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_nothing(spawn, uninterrupted, tmp_path):
    chance = random.Random(20)
    kills, rounds_at_kill, runs = 0, set(), 0
    while kills < KILLS:
        folder = tmp_path / f"run-{runs}"
        runs += 1
        child = spawn(folder, resume=False)
        while kills < KILLS:
            strike(child, folder / "metrics.jsonl", chance)
            if child.exitcode == 0:  # the run was complete before
                break
            assert child.exitcode == -signal.SIGKILL
            kills += 1
            rounds_at_kill.add(lines(folder / "metrics.jsonl"))
            child = spawn(folder, resume=(folder / "config.json").exists())
        finish(child)
        assert_same_run(folder, uninterrupted)
    assert len(rounds_at_kill) > KILLS // 3  # the kills were at different places indeed


def test_a_damaged_checkpoint_is_passed_over_and_said(spawn, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    newest = max((folder / "checkpoints").iterdir())
    tensors = newest / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    finish(spawn(folder, resume=True))
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_more_rounds_after_the_end_equal_as_many_at_once(engine, tmp_path):
    run_in_folder(str(tmp_path / "at once"), resume=False, rounds=9, engine=engine)
    run_in_folder(str(tmp_path / "in two"), resume=False, rounds=4, engine=engine)
    run_in_folder(str(tmp_path / "in two"), resume=True, rounds=9, engine=engine)
    at_once, in_two = (tmp_path / name for name in ("at once", "in two"))
    last = "checkpoints/round-000009/state.safetensors"
    assert (at_once / last).read_bytes() == (in_two / last).read_bytes()
    # Round 4 was the last of the first part, and so it was measured, as no round 4 is in a run of nine.
    records = [[json.loads(line) for line in timeless(folder / "metrics.jsonl")] for folder in (at_once, in_two)]
    assert [record["train_loss"] for record in records[0]] == [record["train_loss"] for record in records[1]]


def test_a_finished_run_resumed_trains_nothing_and_delivers_the_same(tmp_path):
    run_in_folder(str(tmp_path / "run"), resume=False, rounds=6)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes(), (tmp_path / "run" / "model.safetensors").read_bytes()
    run_in_folder(str(tmp_path / "run"), resume=True, rounds=6)
    after = (tmp_path / "run" / "metrics.jsonl").read_bytes(), (tmp_path / "run" / "model.safetensors").read_bytes()
    assert before == after


def test_a_folder_in_use_by_another_process_is_refused(spawn, tmp_path):
    folder = tmp_path / "run"
    child = spawn(folder, resume=False)
    deadline = time.monotonic() + 60
    while not (folder / "config.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    with pytest.raises(RunFolderError, match=f"in use by process {child.pid} "):
        run_in_folder(str(folder), resume=True, rounds=ROUNDS)
    child.kill()
    child.join(10)


@pytest.mark.parametrize(
    ("resume", "seed", "message"),
    [
        (False, 3, "holds this run already: add --resume"),
        (True, 4, "belongs to another configuration .seed: 3 there, 4 here"),
        (False, 4, "belongs to another configuration .seed: 3 there, 4 here"),
    ],
)
def test_a_folder_that_holds_a_run_is_never_overwritten(resume, seed, message, tmp_path):
    folder = tmp_path / "run"
    run_in_folder(str(folder), resume=False, rounds=3)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}
    with pytest.raises(RunFolderError, match=message):
        run_in_folder(str(folder), resume=resume, rounds=3, seed=seed)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert after == before
