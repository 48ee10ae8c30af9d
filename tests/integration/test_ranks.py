"""Several ranks train one model: processes, the numbers of one device, and what is left when one is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from launches import TESTS, Launch, free_port, wait_for
from process_table import children

STRATEGIES = ("ddp", "fsdp")
WORLDS = (2, 3)

EQUAL = {
    "plain": {"kind": "plain"},
    "fewer than ranks in the last batch": {"kind": "adamw", "examples": 37},
    "adamw and a schedule": {"kind": "adamw"},
    "clipping": {"kind": "clip"},
    "accumulation": {"kind": "clip", "accumulate": 2},
    "tied": {"kind": "tied"},
    "frozen": {"kind": "frozen"},
}
"""What must end as on one device."""

OTHERS = {
    "still": {"kind": "still"},
    "one batch": {"kind": "one batch"},
    "buffers": {"kind": "buffers", "examples": 42},
    "dropout": {"kind": "dropout"},
    "bf16": {"kind": "adamw", "precision": "bf16"},
    "early": {"kind": "early", "script": [0.9, 0.1, 0.1, 0.1], "patience": 2},
    "ignored": {"kind": "adamw", "examples": 37, "ignored": True},
    "too few": {"kind": "plain", "examples": 1},
    "lbfgs": {"kind": "lbfgs"},
}

JOBS = [
    {"name": f"{name}, {strategy}", "strategy": strategy, **job}
    for name, job in (EQUAL | OTHERS).items()
    for strategy in STRATEGIES
]


def run(nursery, folder, jobs, *, world=1, seconds=600):
    """Runs trainings one after the other on so many ranks; returns what came of each on each rank."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    words = [folder / "jobs.json", folder]
    if world == 1:
        child = nursery.start("rank_trainings:main", output=folder / "said", arguments=words, cwd=folder)
        assert child.wait(seconds) == 0, child.told
    else:
        launch = Launch(nursery, folder, words, workers=world, run="rank_trainings:main")
        assert launch.codes(seconds) == [0] * world, launch.told
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def results(nursery, tmp_path_factory):
    """What came of all trainings, by the number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return {world: run(nursery, folder / str(world), JOBS, world=world) for world in (1, *WORLDS)}


def assert_close(ours, theirs, *, atol=1e-6):
    """Asserts that two models are equal but for rounding."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)


def measured(found):
    """Returns the held-out metrics, epoch by epoch."""
    return [[record["loss"], record["accuracy"]] for record in found["history"]]


# One process makes the results for all of them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("ranks")]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
class TestRanks:
    @pytest.mark.parametrize("name", EQUAL)
    def test_end_where_one_device_does(self, results, world, strategy, name):
        ours, theirs = (results[count][0][f"{name}, {strategy}"] for count in (world, 1))
        assert ours["history"][-1]["step"] >= 16
        assert_close(ours["last"], theirs["last"])
        assert_close(ours["params"], theirs["params"])
        assert ours["classes"] == theirs["classes"]
        for one, other in zip(ours["history"], theirs["history"], strict=True):
            assert one == pytest.approx(other, rel=1e-5)

    @pytest.mark.parametrize("name", [name for name in EQUAL | OTHERS if name not in ("too few", "lbfgs")])
    def test_all_get_the_same_result(self, results, world, strategy, name):
        first, *others = (found[f"{name}, {strategy}"] for found in results[world])
        assert others == [first] * (world - 1)

    @pytest.mark.parametrize("name", ["still", "one batch"])
    def test_measure_the_same_bits_as_one_device(self, results, world, strategy, name):
        ours, theirs = (results[count][0][f"{name}, {strategy}"] for count in (world, 1))
        assert ours["params"] == theirs["params"]
        assert measured(ours) == measured(theirs)
        assert ours["classes"] == theirs["classes"]
        assert sum(report["examples"] for report in ours["classes"]) == 23

    def test_stop_early_at_the_same_step(self, results, world, strategy):
        for found in results[world]:
            early = found[f"early, {strategy}"]
            assert (early["history"][-1]["epoch"], early["best"]["epoch"]) == (3, 1)
            assert early["stopped"] == "accuracy has not improved for 2 epochs"

    def test_compute_in_16_bits_where_asked(self, results, world, strategy):
        ours, theirs = (results[count][0][f"bf16, {strategy}"] for count in (world, 1))
        assert {"bfloat16 in training", "bfloat16 in evaluation"} <= set(ours["dtypes"])
        assert "float32 in training" not in ours["dtypes"]
        assert_close(ours["last"], theirs["last"], atol=0.02)
        assert results[world][0][f"adamw and a schedule, {strategy}"]["dtypes"] == [
            "float32 in evaluation",
            "float32 in training",
        ]

    def test_labels_that_a_loss_leaves_out_do_not_spoil_the_training(self, results, world, strategy):
        """The mean is then over each rank's own labels, so the numbers are near those of one device, and not equal."""
        ours = results[world][0][f"ignored, {strategy}"]
        assert all(np.isfinite(array).all() for array in ours["last"].values())
        assert_close(ours["last"], results[1][0][f"ignored, {strategy}"]["last"], atol=0.2)

    def test_refuse_what_they_cannot_do(self, results, world, strategy):
        for found in results[world]:
            assert found[f"too few, {strategy}"] == {
                "error": "DataError",
                "message": f"1 examples cannot be divided among {world} devices: use fewer",
            }
            assert found[f"lbfgs, {strategy}"]["error"] == "ConfigurationError"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [*EQUAL, "buffers", "dropout", "bf16"])
def test_fsdp_is_ddp_in_parts(results, world, name):
    parts, copies = (results[world][0][f"{name}, {strategy}"] for strategy in ("fsdp", "ddp"))
    # A BatchNorm over two examples makes much of rounding.
    assert_close(parts["last"], copies["last"], atol={"bf16": 5e-3, "buffers": 2e-4, "dropout": 1e-5}.get(name, 1e-6))


SLOW = {"name": "slow", "kind": "slow", "checkpoint_every": 2, "log_every": 1, "epochs": 5}


def torchrun(folder, job, port):
    """Starts two ranks as users do."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([job]))
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", TESTS / "rank_trainings.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w") as said:
        return subprocess.Popen(
            list(map(str, [sys.executable, *words, folder / "jobs.json", folder])), env=environment,
            stdout=said, stderr=said, process_group=0,
        )  # fmt: skip


def steps(run_dir):
    return [int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*")]


def test_a_killed_rank_ends_all_and_the_rest_is_done_on_any_ranks(nursery, tmp_path):
    """Meanwhile another training runs on the same machine, undisturbed."""
    chance = random.Random(4)
    run_dir = tmp_path / "run"
    [reference] = run(nursery, tmp_path / "alone", [SLOW])
    other = torchrun(tmp_path / "other", SLOW, free_port())
    killed = torchrun(tmp_path / "killed", SLOW | {"slow": 0.05, "run_dir": str(run_dir)}, free_port())
    try:
        at = chance.randint(3, 12)
        wait_for(lambda: max(steps(run_dir), default=0) >= at, seconds=90)
        os.kill(chance.choice(children(killed.pid)), signal.SIGKILL)
        started = time.monotonic()
        assert killed.wait(30) != 0
        assert time.monotonic() - started < 30
        assert other.wait(90) == 0, (tmp_path / "other/said").read_text()
    finally:
        for process in (killed, other):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
    undisturbed = json.loads((tmp_path / "other/rank-0.json").read_text())["slow"]
    assert_close(undisturbed["last"], reference["slow"]["last"])
    for world, strategy in ((1, "single"), (2, "fsdp"), (3, "ddp")):
        copied = tmp_path / f"run-{world}"
        shutil.copytree(run_dir, copied, symlinks=True)
        job = SLOW | {"strategy": strategy, "run_dir": str(copied), "resume": True}
        found = run(nursery, tmp_path / f"on-{world}", [job], world=world)[0]["slow"]
        assert "error" not in found, found
        assert_close(found["last"], reference["slow"]["last"])
        for one, expected in zip(found["history"], reference["slow"]["history"], strict=True):
            assert one == pytest.approx(expected, rel=1e-5)


def test_a_state_divided_among_ranks_is_whole_on_one(nursery, tmp_path):
    """Half a training under FSDP, whose checkpoint has nothing of its division, ends on one device and with DDP."""
    [reference] = run(nursery, tmp_path / "alone", [SLOW])
    half = SLOW | {"strategy": "fsdp", "run_dir": str(tmp_path / "run"), "keep_checkpoints": 99}
    run(nursery, tmp_path / "half", [half], world=2)
    for late in [path for path in (tmp_path / "run/checkpoints").glob("step-*") if int(path.name[-6:]) > 10]:
        shutil.rmtree(late)
    assert max(steps(tmp_path / "run")) == 10
    for world in (1, 3):
        copied = tmp_path / f"run-{world}"
        shutil.copytree(tmp_path / "run", copied, symlinks=True)
        job = SLOW | {"strategy": "ddp", "run_dir": str(copied), "resume": True}
        found = run(nursery, tmp_path / f"on-{world}", [job], world=world)[0]["slow"]
        assert "error" not in found, found
        assert_close(found["last"], reference["slow"]["last"])
