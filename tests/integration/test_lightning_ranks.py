"""Several ranks train a LightningModule with Lightning's DDP and FSDP: one device's numbers, and its checkpoints."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

pytest.importorskip("lightning")

import lightning_ranks
from launches import Launch
from lightning_ranks import FITS, STRATEGIES

TRAINED = ("ddp", "fsdp in units")
CASES = [(name, strategy) for name, job in FITS.items() for strategy in job.get("strategies", STRATEGIES)]

# One process makes the results for all of them.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lightning ranks")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def one(folder):
    """What comes of the training on one device, whose checkpoints the ranks take."""
    return lightning_ranks.train("single", 1, run_dir=folder / "one")


@pytest.fixture(scope="module")
def found(nursery, folder, one):
    """What came of everything on each of two ranks."""
    launch = Launch(nursery, folder, [folder], run="lightning_ranks:main")
    assert launch.codes(150) == [0, 0], launch.told
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def expected(found):
    """What came of all fits on one device."""
    return {name: lightning_ranks.fit(job, "single", 1) for name, job in FITS.items()}


def assert_close(ours, theirs, *, atol=1e-6):
    """Asserts that two models are equal but for rounding."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)


def assert_same_training(ours, theirs):
    """Asserts that two trainings are equal but for rounding, epoch by epoch."""
    assert_close(ours["arrays"], theirs["arrays"])
    for record, other in zip(ours["history"], theirs["history"], strict=True):
        assert record == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_two_ranks_are_one_device_with_twice_the_batch_size(found, expected, name, strategy):
    ours = found[0][f"{name}, {strategy}"]
    assert_close(ours["arrays"], expected[name]["arrays"])
    for metrics, other in zip(ours["metrics"], expected[name]["metrics"], strict=True):
        assert metrics == pytest.approx(other, abs=1e-6)
    kept = [array for array in ours["arrays"] if array.startswith("carried/")]
    assert bool(kept) == (FITS[name].get("calls", 1) > 1 and name != "kept without a state")


def test_all_ranks_get_the_same(found):
    first, other = found
    assert first.keys() == other.keys()
    assert [name for name in first if first[name] != other[name]] == []


def test_fsdp_is_ddp_in_parts_for_statistics_and_in_16_bits(found):
    results = found[0]
    assert_close(results["buffers, fsdp"]["arrays"], results["buffers, ddp"]["arrays"])
    assert any("running_var" in name for name in results["buffers, fsdp"]["arrays"])
    for strategy in ("fsdp", "fsdp in units"):
        assert_close(results[f"bf16, {strategy}"]["arrays"], results["bf16, ddp"]["arrays"], atol=5e-3)
        assert results[f"bf16, {strategy}"]["arrays"] != results[f"even, {strategy}"]["arrays"]


@pytest.mark.parametrize("strategy", TRAINED)
class TestTraining:
    def test_it_is_that_of_one_device(self, found, one, strategy):
        assert_same_training(found[0][f"training, {strategy}"], one)
        assert len(one["history"]) == 3

    def test_resumed_it_ends_as_one_that_was_not_interrupted(self, found, strategy):
        assert found[0][f"resumed, {strategy}"] == found[0][f"training, {strategy}"]

    def test_it_goes_on_from_a_checkpoint_of_one_device(self, found, one, strategy):
        assert_same_training(found[0][f"from one, {strategy}"], one)

    def test_one_device_goes_on_from_its_checkpoint(self, found, folder, one, strategy):
        ours = lightning_ranks.resumed(folder / strategy, folder, f"{strategy} to one", "single", 1)
        assert_same_training(ours, one)


def test_ranks_that_measure_differently_stop_together(found):
    for results in found:
        assert results["early"]["stopped"] == "accuracy has not improved for 1 epochs"
        assert [record["epoch"] for record in results["early"]["history"]] == [1, 2]


EXPERIMENT = """
import shoal
from lightning_modules import Scheduled
from support import samples


def training(*, seed: int = 0):
    learner = shoal.LightningLearner(Scheduled, trainer={"accelerator": "cpu"}, batch_size=16)
    held_out = samples(21, seed=1)
    return shoal.Training(name="lit", learner=learner, data=samples(40), evaluate=held_out, epochs=2, seed=seed)
"""


def test_the_command_starts_ranks_for_it(forked, tmp_path):
    (tmp_path / "lit.py").write_text(EXPERIMENT)
    words = ["--devices", 2, "--strategy", "ddp", "--accelerator", "cpu", "--run-dir", "run", "--batch-size", 8]
    done = forked("forked:command", "train", "lit.py", *words, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "batch: 8 examples a device × 2 devices = 16 a step (ddp, fp32)" in done.stdout
    assert len(re.findall(r"^epoch \d/2 · ", done.stdout, re.M)) == 2
    assert done.stderr == ""
    recorded = json.loads((tmp_path / "run/config.json").read_text())["environment"]["devices"]
    assert (recorded["strategy"], recorded["count"]) == ("ddp", 2)
