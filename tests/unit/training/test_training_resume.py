"""A training that is stopped anywhere and gone on with ends like one that never was."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import shoal
from shoal.errors import CheckpointError, RunFolderError, RunInterrupted
from shoal.runs import TIME_KEYS
from support import BatchNormNet, assert_equal, learner, samples

EPOCHS, STEPS = 4, 40
MEASURED = TIME_KEYS | {"utilization", "memory_bytes"}

LEARNERS = {
    "momentum": {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)},
    "adamw": {"optimizer": partial(torch.optim.AdamW, lr=0.01)},
    "amsgrad": {"optimizer": partial(torch.optim.Adam, lr=0.01, amsgrad=True, betas=(0.8, 0.9))},
    "schedule": {"schedule": shoal.WarmupCosine(warmup_epochs=1.5), "optimizer": partial(torch.optim.SGD, lr=0.3)},
    "dropout": {"model": BatchNormNet, "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)},
    "workers": {"model": BatchNormNet, "workers": 2},
    "bf16": {"devices": shoal.Devices(accelerator="cpu", precision="bf16"), "optimizer": torch.optim.Adagrad},
    "all": {
        "model": BatchNormNet,
        "optimizer": partial(torch.optim.AdamW, lr=0.02),
        "schedule": shoal.WarmupCosine(warmup_epochs=0.5, floor=0.1),
        "batch_size": 2,
        "accumulate": 2,
        "clip_norm": 0.5,
        "train_metrics": True,
    },
}

stop_at = 0
"""At which of the next calls of the loss the process is sent :data:`stop_by`; 0: at none."""
stop_by = signal.SIGINT


def counted_loss(output, target):
    """Cross entropy, in which a signal may come."""
    global stop_at  # noqa: PLW0603
    if output.requires_grad and stop_at:
        stop_at -= 1
        if stop_at == 0:
            os.kill(os.getpid(), stop_by)
    return F.cross_entropy(output, target)


def train(run_dir, *, resume=False, **settings):
    kind = settings.pop("kind", "all")
    own = {"loss": counted_loss, **LEARNERS[kind], **settings.pop("more", {})}
    settings = {"epochs": EPOCHS, "seed": 3, "evaluate": samples(23, seed=5), "tensorboard": False, **settings}
    return shoal.train(learner(**own), samples(37), run_dir=run_dir, resume=resume, **settings)


def stopped(run_dir, *, after, by=signal.SIGINT, **settings):
    """Trains until a signal comes in the next step but so many; returns what the run said."""
    global stop_at, stop_by  # noqa: PLW0603
    stop_at, stop_by = after, by
    try:
        with pytest.raises(RunInterrupted) as caught:
            train(run_dir, **settings)
    finally:
        stop_at = 0
    return str(caught.value)


def records(result):
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in result.history]


def last_state(run_dir):
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return newest.name, load_file(newest / "state.safetensors")


def assert_same_end(run_dir, result, reference_dir, reference, *, rel=0.0):
    """Asserts the same models, optimizer and records; training means may be summed in other parts."""
    assert_equal(result.params, reference.params)
    assert_equal(result.last_params, reference.last_params)
    name, state = last_state(run_dir)
    expected_name, expected = last_state(reference_dir)
    assert name == expected_name
    assert_equal(state, expected)
    assert result.best == reference.best
    assert result.classes == reference.classes
    assert result.stopped == reference.stopped
    for ours, theirs in zip(records(result), records(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=rel, abs=0.0)
    on_disk = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert on_disk == list(result.history)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Trainings without an interruption, each made once."""
    made = {}

    def reference(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "run"
            made[kind] = folder, train(folder, kind=kind)
        return made[kind]

    return reference


@pytest.mark.parametrize("kind", LEARNERS)
def test_ctrl_c_in_any_step_changes_nothing(kind, references, tmp_path):
    chance = random.Random(kind)
    reference_dir, reference = references(kind)
    run_dir, left, resume = tmp_path / "run", STEPS * (2 if kind == "all" else 1), False
    for _ in range(3):
        after = chance.randint(1, left // 3)
        left -= after
        said = stopped(run_dir, after=after, kind=kind, resume=resume)
        assert said.endswith(f"the state is saved in {run_dir}")
        assert not multiprocessing.active_children()
        resume = True
    result = train(run_dir, kind=kind, resume=True)
    assert_same_end(run_dir, result, reference_dir, reference, rel=1e-14)


@pytest.mark.parametrize("step", [1, 9, 10, 11, 20, 39, 40])
def test_ctrl_c_around_the_end_of_an_epoch_changes_nothing(step, references, tmp_path):
    reference_dir, reference = references("momentum")
    said = stopped(tmp_path / "run", after=step, kind="momentum")
    assert said == f"stopped after step {step}; the state is saved in {tmp_path / 'run'}"
    result = train(tmp_path / "run", kind="momentum", resume=True)
    assert_same_end(tmp_path / "run", result, reference_dir, reference, rel=1e-14)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_crash_goes_back_to_the_last_checkpoint_and_changes_nothing(kind, references, tmp_path):
    """A copy of the folder at a moment is what a crash at that moment leaves."""
    reference_dir, reference = references(kind)
    at = random.Random(f"crash {kind}").sample(range(2, STEPS), 2)

    class Copying(shoal.TrainingCallback):
        def on_steps(self, progressed):
            if progressed.step in at:
                shutil.copytree(tmp_path / "run", tmp_path / f"at-{progressed.step}")

    at_once = train(tmp_path / "run", kind=kind, checkpoint_every=3, log_every=1, callbacks=[Copying()])
    for step in at:
        run_dir = tmp_path / f"at-{step}"
        name, _ = last_state(run_dir)
        assert 0 <= step - int(name.removeprefix("step-")) <= 3
        result = train(run_dir, kind=kind, checkpoint_every=3, log_every=1, resume=True)
        assert_same_end(run_dir, result, tmp_path / "run", at_once)
        assert_same_end(run_dir, result, reference_dir, reference, rel=1e-14)


class TestWhatIsFound:
    def test_a_torn_checkpoint_is_passed_over_and_said(self, references, tmp_path):
        reference_dir, reference = references("adamw")
        run_dir = tmp_path / "run"
        stopped(run_dir, after=27, kind="adamw", checkpoint_every=4)
        newest = max((run_dir / "checkpoints").glob("step-*"))
        tensors = newest / "state.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-50])
        result = train(run_dir, kind="adamw", resume=True)
        assert_same_end(run_dir, result, reference_dir, reference, rel=1e-14)
        [notice] = result.notices
        assert notice.startswith(f"checkpoint {newest.name} is damaged")
        assert "going on from step-0000" in notice

    def test_no_checkpoint_that_can_be_read_is_one_line(self, tmp_path):
        train(tmp_path / "run", epochs=2)
        for tensors in (tmp_path / "run/checkpoints").glob("*/state.safetensors"):
            tensors.write_bytes(b"")
        with pytest.raises(CheckpointError, match="no checkpoint in .* can be read") as caught:
            train(tmp_path / "run", epochs=2, resume=True)
        assert "\n" not in str(caught.value)

    def test_a_lost_best_model_is_said_and_another_chosen(self, tmp_path):
        run_dir = tmp_path / "run"
        own = {"metrics": {"accuracy": falling}}
        stopped(run_dir, after=2 * 33, more=own, keep_checkpoints=1)
        best = run_dir / "checkpoints/step-000010"
        (best / "state.safetensors").write_bytes(b"")
        result = train(run_dir, more=own, resume=True, keep_checkpoints=1)
        assert any("it was the best, which is chosen anew from here on" in notice for notice in result.notices)
        assert result.best.epoch == 4
        assert_equal(result.params, result.last_params)

    def test_a_finished_training_trains_nothing_and_delivers_the_same(self, references, tmp_path):
        reference_dir, reference = references("all")
        run_dir = tmp_path / "run"
        shutil.copytree(reference_dir, run_dir)
        before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
        result = train(run_dir, resume=True)
        assert_same_end(run_dir, result, reference_dir, reference)
        assert result.history == reference.history
        assert before == {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}

    def test_a_run_that_never_saved_begins_anew(self, references, tmp_path):
        reference_dir, reference = references("momentum")

        class Stopping(shoal.TrainingCallback):
            def on_train_start(self, training):
                raise KeyboardInterrupt

        with pytest.raises(RunInterrupted, match="^stopped before the first step$"):
            train(tmp_path / "run", kind="momentum", callbacks=[Stopping()])
        result = train(tmp_path / "run", kind="momentum", resume=True)
        assert_same_end(tmp_path / "run", result, reference_dir, reference)

    def test_patience_counts_on_after_a_resume(self, tmp_path):
        own = {"metrics": {"accuracy": falling}}
        stopped(tmp_path / "run", after=2 * 25, more=own, epochs=9)
        result = train(tmp_path / "run", more=own, resume=True, patience=3, epochs=9)
        assert (len(result.history), result.best.epoch) == (4, 1)

    def test_without_a_folder_nothing_is_kept_and_that_is_said(self):
        assert stopped(None, after=5, kind="momentum") == "stopped after step 5; without a run folder nothing was kept"


def falling(output, target):
    """An "accuracy" that is the best at first, because the scores grow."""
    return -output.abs().mean()


class TestWhatMayChange:
    def test_the_division_of_a_step_may(self, tmp_path):
        """The same examples in other pieces: equal but for rounding."""
        halves = {"batch_size": 2, "accumulate": 2}
        whole = {"batch_size": 4, "accumulate": 1}
        kind = "adamw"
        reference = train(tmp_path / "reference", kind=kind, more=whole)
        stopped(tmp_path / "run", after=2 * 13, kind=kind, more=halves)
        result = train(tmp_path / "run", kind=kind, more=whole, resume=True)
        assert_equal(result.last_params, reference.last_params, atol=1e-5)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"more": {"batch_size": 4}}, "effective_batch: 4 there, 8 here"),
            ({"seed": 4}, "seed: 3 there, 4 here"),
            ({"epochs": 5}, "epochs: 4 there, 5 here"),
            ({"scale_lr": True}, "lr_factor: 1.0 there, 2.0 here"),
            ({"kind": "momentum", "more": {"batch_size": 4}}, "learner"),
            ({"evaluate": None}, "evaluate"),
            ({"evaluate": samples(23, seed=6)}, "evaluate"),
            ({"more": {"clip_norm": 0.6}}, "learner.clip_norm: 0.5 there, 0.6 here"),
            ({"more": {"schedule": shoal.WarmupCosine(warmup_epochs=1)}}, "schedule"),
        ],
    )
    def test_what_decides_the_numbers_may_not(self, settings, message, tmp_path):
        stopped(tmp_path / "run", after=2 * 13)
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        with pytest.raises(RunFolderError, match="belongs to another configuration") as caught:
            train(tmp_path / "run", resume=True, **settings)
        assert message in str(caught.value)
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def test_how_it_is_watched_may(self, references, tmp_path):
        reference_dir, reference = references("all")
        stopped(tmp_path / "run", after=2 * 13, log_every=5)
        result = train(tmp_path / "run", resume=True, log_every=3, checkpoint_every=7, keep_checkpoints=1)
        assert_same_end(tmp_path / "run", result, reference_dir, reference, rel=1e-14)

    def test_a_batch_of_everything_is_one_however_it_is_called(self, tmp_path):
        stopped(tmp_path / "run", after=2, kind="momentum", more={"batch_size": None})
        result = train(tmp_path / "run", resume=True, kind="momentum", more={"batch_size": 64})
        assert len(result.history) == EPOCHS
