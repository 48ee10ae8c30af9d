from __future__ import annotations

import json
import math
from functools import partial
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from torch.nn import functional as F

import shoal
from shoal.data import ArrayDataset
from shoal.randomness import generator
from shoal.types import Broadcast
from support import BatchNormNet, Mlp, assert_equal, differ, learner, samples

HELD_OUT = samples(23, seed=5)


def train(*, data=None, **settings):
    settings = {"epochs": 3, "evaluate": HELD_OUT, "tensorboard": False, "seed": 7, **settings}
    return shoal.train(settings.pop("learner", None) or learner(), data or samples(37), **settings)


def scripted(*values):
    """Returns a learner whose accuracy on held-out data is what a test says, measurement by measurement."""
    coming = iter(values)
    return learner(metrics={"accuracy": lambda output, target: torch.tensor(next(coming))})


class Noting(shoal.TrainingCallback):
    def __init__(self):
        self.calls, self.steps, self.records, self.info, self.result = [], [], [], None, None

    def on_train_start(self, training):
        self.calls.append("start")
        self.info = training

    def on_steps(self, progressed):
        self.calls.append("steps")
        self.steps.append(progressed)

    def on_epoch_end(self, record):
        self.calls.append("epoch")
        self.records.append(record)

    def on_train_end(self, result):
        self.calls.append("end")
        self.result = result

    def close(self):
        self.calls.append("close")


class TestAnEpoch:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"optimizer": partial(torch.optim.AdamW, lr=0.01)},
            {"accumulate": 3, "clip_norm": 0.2},
            {"schedule": shoal.WarmupCosine(warmup_epochs=0.3)},
            {"batch_size": None},
            {"train_metrics": True, "workers": 2},
        ],
        ids=str,
    )
    def test_is_what_a_client_does_in_one_round(self, settings):
        one = learner(**settings)
        start = one.init(7)
        update = one.fit(Broadcast(model=start, round=1), samples(37), generator(7, "fit", round=1))
        expected = {name: (start.params[name] + delta).float() for name, delta in update.delta.items()}
        result = train(learner=learner(**settings), epochs=1)
        assert_equal(result.last_params, expected)
        for name, value in update.metrics.items():
            assert result.history[0][f"train_{name}"] == value

    def test_sees_every_example_once_in_an_order_of_its_own(self):
        seen = []

        def noting(inputs):
            seen.extend(inputs[:, 0].tolist())
            return inputs

        data = ArrayDataset(np.arange(37 * 6, dtype=np.float32).reshape(37, 6) / 100, np.arange(37) % 3)
        train(data=data, learner=learner(transform=noting), evaluate=None, epochs=2)
        first, second = seen[-74:-37], seen[-37:]
        assert sorted(first) == sorted(second) == data.inputs[:, 0].tolist()
        assert first != second

    def test_leaves_the_users_model_and_random_numbers_alone(self):
        model = Mlp()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        result = train(learner=learner(model))
        assert torch.equal(torch.rand(3), expected)
        assert_equal(model.state_dict(), before)
        assert differ(result.params, before)


class TestHistory:
    def test_has_a_record_an_epoch_that_is_also_on_disk(self, tmp_path):
        result = train(run_dir=tmp_path / "run", learner=learner(train_metrics=True))
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == list(result.history)
        assert [record["epoch"] for record in result.history] == [1, 2, 3]
        assert [record["step"] for record in result.history] == [10, 20, 30]
        for record in result.history:
            assert record["examples"] == 37
            assert record["learning_rate"] == 0.1
            assert {"train_loss", "train_accuracy", "loss", "accuracy", "elapsed"} <= set(record)
        assert result.stopped == "all epochs done"

    @pytest.mark.parametrize("settings", [{}, {"log_every": 1}, {"log_every": 3}, {"checkpoint_every": 4}], ids=str)
    def test_is_the_same_however_often_progress_is_told(self, settings, tmp_path):
        result = train(run_dir=tmp_path / "run", learner=learner(train_metrics=True), **settings)
        reference = train(learner=learner(train_metrics=True))
        assert_equal(result.last_params, reference.last_params)
        for ours, theirs in zip(result.history, reference.history, strict=True):
            for name in ("train_loss", "train_accuracy", "loss", "accuracy"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-14)

    def test_the_training_loss_is_the_mean_over_the_epochs_examples(self):
        losses = []

        def noting(output, target):
            loss = F.cross_entropy(output, target)
            losses.append((loss.item(), len(target)))
            return loss

        result = train(learner=learner(loss=noting), evaluate=None, epochs=1)
        taken = losses[1:]  # the first is the check's
        assert sum(count for _, count in taken) == 37
        expected = math.fsum(loss * count for loss, count in taken) / 37
        assert result.history[0]["train_loss"] == pytest.approx(expected, rel=1e-14)

    def test_held_out_data_are_measured_when_due_and_at_the_end(self):
        result = train(epochs=5, evaluate_every=2)
        assert [record["epoch"] for record in result.history if "loss" in record] == [2, 4, 5]

    def test_what_is_measured_is_what_the_learner_measures(self):
        result = train(learner=learner(eval_batch_size=5))
        one = learner(eval_batch_size=5)
        state = one.init(0)
        for name, tensor in state.params.items():
            tensor.copy_(result.last_params[name])
        assert one.evaluate(state, HELD_OUT) == {name: result.history[-1][name] for name in ("loss", "accuracy")}


class TestTheBest:
    def test_is_delivered_and_the_last_beside_it(self, tmp_path):
        result = train(learner=scripted(0.1, 0.9, 0.2), run_dir=tmp_path / "run")
        assert result.best == shoal.training.BestEpoch(epoch=2, metric="accuracy", value=pytest.approx(0.9))
        assert_equal(result.params, train(epochs=2).last_params)
        assert_equal(result.last_params, train(epochs=3).last_params)
        assert_equal(load_file(tmp_path / "run/model.safetensors"), {k: v.numpy() for k, v in result.params.items()})

    def test_the_report_by_class_is_the_bests(self):
        result = train(learner=scripted(0.9, 0.1, 0.2))
        model = Mlp()
        model.load_state_dict(result.params)
        taken = model(torch.from_numpy(HELD_OUT.inputs)).argmax(1).numpy()
        for report in result.classes:
            right = ((taken == report.label) & (HELD_OUT.targets() == report.label)).sum()
            assert report.examples == (HELD_OUT.targets() == report.label).sum()
            assert report.recall == right / report.examples
            assert report.precision == (right / (taken == report.label).sum() if right else 0.0)

    def test_without_held_out_data_the_last_is_what_there_is(self):
        result = train(evaluate=None)
        assert result.best is None
        assert result.classes == ()
        assert_equal(result.params, result.last_params)

    def test_its_buffers_are_its_own(self):
        result = train(
            learner=learner(BatchNormNet, metrics=scripted(0.9, 0.1, 0.1).metrics), epochs=3
        )  # fmt: skip
        assert_equal(result.params, train(learner=learner(BatchNormNet), epochs=1).last_params)
        assert differ(result.params, result.last_params)

    @pytest.mark.parametrize(
        ("values", "settings", "epochs", "reason"),
        [
            ((0.5, 0.4, 0.3), {"patience": 2}, 3, "accuracy has not improved for 2 epochs"),
            ((0.5, 0.7), {"target": 0.6}, 2, "accuracy has reached 0.6"),
            ((0.5,), {"max_seconds": 1e-9}, 1, "1e-09 seconds have passed"),
        ],
    )
    def test_it_stops_when_it_should(self, values, settings, epochs, reason):
        result = train(learner=scripted(*values), epochs=9, **settings)
        assert (len(result.history), result.stopped) == (epochs, reason)

    def test_labels_that_the_loss_leaves_out_belong_to_no_class(self):
        labels = HELD_OUT.targets().copy()
        labels[::2] = -100
        result = train(evaluate=ArrayDataset(HELD_OUT.inputs, labels))
        assert [report.examples for report in result.classes] == [(labels == label).sum() for label in range(3)]

    def test_a_regression_has_no_classes(self):
        data = ArrayDataset(samples(37).inputs, np.zeros((37, 3), np.float32))
        result = train(data=data, evaluate=data, learner=learner(loss=F.mse_loss))
        assert result.classes == ()
        assert result.best.metric == "loss"


class TestCallbacks:
    def test_hear_everything_in_order(self):
        noting = Noting()
        result = train(callbacks=[noting], log_every=4, epochs=2)
        assert noting.calls == ["start", *["steps"] * 3, "epoch", *["steps"] * 3, "epoch", "end", "close"]
        assert [told.step for told in noting.steps] == [4, 8, 10, 12, 16, 20]
        assert noting.records == list(result.history)
        assert noting.result is result

    def test_are_told_of_the_batch_and_the_rates(self):
        noting = Noting()
        train(callbacks=[noting], learner=learner(accumulate=3), scale_lr=True)
        info = noting.info
        assert (info.per_device, info.device_count, info.accumulate) == (4, 1, 3)
        assert (info.rates, info.base_rates) == ((pytest.approx(0.3),), (pytest.approx(0.1),))
        assert (info.steps, info.first_step, info.examples) == (12, 0, 37)

    def test_are_closed_after_an_error(self):
        class Broken(Noting):
            def on_epoch_end(self, record):
                raise ZeroDivisionError

        noting, broken = Noting(), Broken()
        with pytest.raises(ZeroDivisionError):
            train(callbacks=[broken, noting])
        assert broken.calls[-1] == noting.calls[-1] == "close"


class TestNumbersThatAreNone:
    """A training whose loss is no number any more can be stored, shown and gone on with."""

    def test_a_diverged_training_is_stored_and_resumed(self, tmp_path):
        def nan(output, target):
            return F.cross_entropy(output, target) * float("nan")

        def told(**settings):
            console = Console(file=StringIO(), width=200)
            shown = shoal.TrainingProgress(console)
            result = train(
                learner=learner(loss=nan), run_dir=tmp_path / "run", checkpoint_every=3, callbacks=[shown], **settings
            )
            return result, console.file.getvalue()

        first, _ = told()
        again, said = told(resume=True)
        assert math.isnan(first.history[-1]["train_loss"])
        assert repr(again.history) == repr(first.history)
        assert "loss" in said
        assert "nan" in said
        assert again.best.metric == "accuracy"
