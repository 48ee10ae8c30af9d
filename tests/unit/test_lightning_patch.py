"""A patched Trainer in one process: what it loads, trains, sends and keeps, task by task."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import shoal
import shoal.client
import shoal.lightning
from lightning_modules import Classifier, Scheduled
from shoal.client import loop
from shoal.client.task import Task
from shoal.devices import Launched
from shoal.errors import ConfigurationError, MissingExtraError
from shoal.learners.lightning_counts import Examples
from shoal.processes.tensors import TensorFile
from shoal.types import Broadcast, LocalObjective
from support import assert_equal, differ, samples
from tracked import tensorboard_events

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore:.*LeafSpec.* is deprecated:FutureWarning"
)

COUNT = 11


class Server:
    """Takes the replies of rank 0."""

    rank = 0

    def __init__(self):
        self.told = []

    def reply(self, told, fd):
        arrays = {}
        if fd is not None:
            with TensorFile(os.dup(fd)) as file:
                arrays = {name: torch.as_tensor(file.read(name, like=torch.empty(0))).clone() for name in file.entries}
        self.told.append({**told, "arrays": arrays})


@pytest.fixture(autouse=True)
def _no_task():
    yield
    loop._at.clear()


@pytest.fixture
def server():
    return Server()


def learner(module=Classifier, **settings):
    return shoal.LightningLearner(module, trainer={"accelerator": "cpu"}, batch_size=None, **settings)


def give(server, kind="train", number=1, *, module=Classifier, model=None, **more):
    """Lets this process be at a task."""
    model = model or learner(module).init(3)
    task = Task(kind=kind, round=number, rounds=3, site="site-1", model=model, _link=server, **more)
    loop._at[:] = [task]
    return task


def trainer_in(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": folder} | quiet | options
    return Trainer(**options)


def loader(count=COUNT, *, batch_size=None, **settings):
    data = TensorDataset(*(torch.as_tensor(part) for part in samples(count).take(np.arange(count))))
    return DataLoader(data, batch_size=batch_size or count, **settings)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(("proximal", "corrected"), [(0.5, False), (0.0, True), (0.5, True)])
def test_fit_starts_from_the_global_model_and_sends_what_a_learner_would(tmp_path, server, epochs, proximal, corrected):
    """With one batch, an epoch is one step; a correction is what SCAFFOLD sends along."""
    model, generator = learner().init(3), torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(array.shape, generator=generator) for name, array in model.params.items()}
    trainer = trainer_in(tmp_path, max_epochs=epochs)
    shoal.lightning.patch(trainer)
    objective = LocalObjective(proximal=proximal, correction=drawn if corrected else None)
    task = give(server, model=model, objective=objective)
    trainer.fit(Classifier(), loader())
    broadcast = Broadcast(round=1, model=task.model, objective=task.objective)
    update = learner(epochs=epochs).fit(broadcast, samples(COUNT), np.random.default_rng(0))
    [told] = server.told
    sent = {name: told["arrays"][name] - task.model.params[name] for name in update.delta}
    assert_equal(sent, {name: delta.float() for name, delta in update.delta.items()}, atol=1e-6)
    if epochs == 1 and corrected:  # at the global model the proximal term has no gradient
        plain = learner().fit(Broadcast(round=1, model=model), samples(COUNT), np.random.default_rng(0))
        step = {name: plain.delta[name].float() - 0.1 * array for name, array in drawn.items()}
        assert_equal(sent, step, atol=1e-6)
    assert told["examples"] == COUNT
    assert told["metrics"]["loss"] == pytest.approx(update.metrics["loss"], abs=1e-6)


@pytest.mark.parametrize("keep", [True, False])
def test_optimizers_and_schedules_go_on_or_begin_anew(tmp_path, server, keep):
    seen = []

    class Asking(Scheduled):
        def configure_optimizers(self):
            seen.append((self.trainer.max_epochs, self.trainer.estimated_stepping_batches))
            return super().configure_optimizers()

    trainer, module = trainer_in(tmp_path), Asking()
    shoal.lightning.patch(trainer, keep_optimizer=keep)
    site = learner(Scheduled, epochs=2, keep_optimizer=keep)
    for number in (1, 2):
        task = give(server, number=number, module=Scheduled)
        trainer.fit(module, loader())
        update = site.fit(Broadcast(round=number, model=task.model), samples(COUNT), np.random.default_rng(0))
        sent = server.told[-1]["arrays"]
        assert_equal(
            {name: sent[name] - task.model.params[name] for name in update.delta},
            {name: delta.float() for name, delta in update.delta.items()},
            atol=1e-6,
        )
        assert (trainer.current_epoch, trainer.global_step, trainer.max_epochs) == (2 * number, 2 * number, 2)
    assert differ(server.told[0]["arrays"], server.told[1]["arrays"]) is keep
    assert seen == [(6, 6) if keep else (2, 2)] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_what_calls_log_within_a_second_is_all_in_one_file_of_events(tmp_path, server, fails):
    class Failing(Callback):
        def on_train_end(self, trainer, pl_module):
            assert not fails

    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = trainer_in(tmp_path, logger=logger, callbacks=[Failing()], log_every_n_steps=1)
    shoal.lightning.patch(trainer)
    for number in (1, 2):
        give(server, number=number)
        trainer.validate(Classifier(), loader(), verbose=False)
        with pytest.raises(AssertionError) if fails else nullcontext():
            trainer.fit(Classifier(), loader(), loader())
    assert len(list(tmp_path.glob("events*"))) == 1
    found = [value.tag for event in tensorboard_events(tmp_path) for value in event.summary.value]
    assert (found.count("accuracy"), found.count("loss")) == (2 + 4, 2 + 4 + 4)  # measured, and that with the 4 steps
    assert "finalize" not in vars(logger)


def test_a_rounds_limit_may_be_steps(tmp_path, server):
    trainer, module = trainer_in(tmp_path, max_epochs=-1, max_steps=3), Classifier()
    shoal.lightning.patch(trainer)
    for number in (1, 2):
        give(server, number=number)
        trainer.fit(module, loader(batch_size=2))
        assert (trainer.global_step, trainer.max_steps) == (3 * number, 3)
        assert server.told[-1]["examples"] == 6


def test_a_task_to_evaluate_is_for_validate(tmp_path, server):
    trainer, module = trainer_in(tmp_path), Classifier()
    shoal.lightning.patch(trainer)
    task = give(server, "evaluate")
    before = {name: array.clone() for name, array in module.state_dict().items()}
    trainer.fit(module, loader())
    assert not server.told
    assert not differ(before, module.state_dict())
    trainer.validate(module, loader(batch_size=4), verbose=False)
    [told] = server.told
    assert_equal(dict(module.state_dict()), task.model.params)
    expected = learner().evaluate(task.model, samples(COUNT))
    assert told["metrics"] == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    assert (told["examples"], told["arrays"]) == (COUNT, {})
    trainer.validate(module, loader(), verbose=False)
    assert len(server.told) == 1


def test_a_checkpoint_is_not_the_global_model(tmp_path, server):
    trainer, module = trainer_in(tmp_path), Classifier()
    shoal.lightning.patch(trainer)
    give(server)
    trainer.fit(module, loader())
    best = trainer.checkpoint_callback.best_model_path
    give(server, "evaluate")
    trainer.validate(module, loader(), ckpt_path=best, verbose=False)
    assert len(server.told) == 1
    give(server)
    with pytest.raises(ConfigurationError, match="it starts from the global model"):
        trainer.fit(module, loader(), ckpt_path=best)


def test_validation_after_fit_measures_what_was_trained(tmp_path, server):
    trainer, module = trainer_in(tmp_path), Classifier()
    shoal.lightning.patch(trainer)
    give(server)
    trainer.fit(module, loader())
    trainer.validate(module, loader(), verbose=False)
    assert not differ(dict(module.state_dict()), server.told[0]["arrays"])


def test_metrics_are_of_training_alone(tmp_path, server):
    class Telling(Classifier):
        def validation_step(self, batch, index):
            self.log("loss", 100.0)
            self.log("other", 1.0)

    told = []
    for val in (None, loader()):
        trainer = trainer_in(tmp_path / str(len(told)), num_sanity_val_steps=2)
        shoal.lightning.patch(trainer)
        give(server)
        trainer.fit(Telling(), loader(batch_size=4), val)
        told.append(server.told[-1]["metrics"])
    assert told[0] == told[1]
    assert told[0].keys() == {"loss"}


def test_examples_are_those_of_one_pass_or_what_the_user_says(tmp_path, server):
    for options, given, expected in (({}, None, 11), ({"limit_train_batches": 2}, None, 8), ({}, 5.5, 5.5)):
        trainer = trainer_in(tmp_path / str(expected), **options)
        shoal.lightning.patch(trainer, examples=given)
        give(server)
        trainer.fit(Classifier(), loader(batch_size=4))
        assert server.told[-1]["examples"] == expected
    with pytest.raises(ConfigurationError, match=r"patch\(trainer, examples=…\)"):
        Examples(None)(object())


@pytest.mark.parametrize(("drop_last", "expected"), [(False, 7), (True, 6)])
def test_what_a_sampler_repeats_counts_once(tmp_path, drop_last, expected):
    data = TensorDataset(torch.arange(7))
    sampler = DistributedSampler(data, num_replicas=2, rank=0, drop_last=drop_last)
    trainer = trainer_in(tmp_path)
    assert Examples(None).over_ranks(trainer, sampler.total_size, DataLoader(data, sampler=sampler)) == expected
    assert Examples(None).over_ranks(trainer, 4, DataLoader(data, sampler=sampler)) == 4


def test_each_round_has_its_own_checkpoints_and_its_own_patience(tmp_path, server):
    class Worse(Classifier):
        def validation_step(self, batch, index):
            self.log("score", float(self.trainer.current_epoch))

    stopping = EarlyStopping("score", patience=1)
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="score", save_last=True)
    trainer, module = trainer_in(tmp_path, max_epochs=5, num_sanity_val_steps=0, callbacks=[stopping, keeping]), Worse()
    shoal.lightning.patch(trainer)
    for number in (1, 2):
        give(server, number=number)
        trainer.fit(module, loader(), loader())
        assert trainer.current_epoch == 2 * number  # the second is worse than the first, and there ends patience
        own = tmp_path / "kept" / "site-1" / f"round-{number}"
        assert sorted(path.name for path in own.iterdir()) == [
            f"epoch={2 * number - 2}-step={2 * number - 1}.ckpt",
            "last.ckpt",
        ]
        assert keeping.best_model_path == str(next(own.glob("epoch*")))
        assert trainer.validate(module, loader(), ckpt_path="best", verbose=False)


def test_a_site_that_was_started_again_tests_the_global_model(tmp_path, server, caplog):
    class Tested(Classifier):
        def test_step(self, batch, index):
            return self.validation_step(batch, index)

    trainer, module = trainer_in(tmp_path), Tested()
    shoal.lightning.patch(trainer)
    task = give(server, "evaluate", 2)
    trainer.validate(module, loader(), verbose=False)
    tested = trainer.test(ckpt_path="best", dataloaders=loader(), verbose=False)
    assert tested[0]["loss"] == pytest.approx(server.told[0]["metrics"]["loss"], abs=1e-6)
    assert "no best checkpoint" in caplog.text
    give(server, model=task.model)
    with pytest.raises(ValueError, match="best"):
        trainer.test(ckpt_path="best", dataloaders=loader(), verbose=False)


def test_one_fit_in_a_turn_and_one_patch_for_a_trainer(tmp_path, server):
    trainer, module = trainer_in(tmp_path), Classifier()
    shoal.lightning.patch(trainer)
    with pytest.raises(ConfigurationError, match="patched already"):
        shoal.lightning.patch(trainer)
    give(server)
    trainer.fit(module, loader())
    with pytest.raises(ConfigurationError, match="once in each turn"):
        trainer.fit(module, loader())
    with pytest.raises(ConfigurationError, match="examples must be > 0"):
        shoal.lightning.patch(trainer_in(tmp_path), examples=0)
    give(server, number=2)
    trainer.limit_train_batches = 0
    with pytest.raises(ConfigurationError, match="trained on no example in round 2"):
        trainer.fit(module, loader())


@pytest.mark.parametrize(
    ("options", "ranks", "why"),
    [
        ({}, 2, "the site has 2 ranks, and the Trainer has 1 devices: say devices=2, strategy='ddp'"),
        ({"devices": 2, "strategy": "ddp"}, 1, "the site has 1 rank, and the Trainer has 2 devices"),
        ({"devices": 2, "strategy": "ddp_spawn"}, 2, "starts processes"),
        ({"max_epochs": None}, 1, "a round would never end"),
        ({"max_epochs": -1}, 1, "a round would never end"),
    ],
)
def test_trainers_that_a_site_cannot_use_are_refused(tmp_path, options, ranks, why):
    place = Launched(rank=0, count=ranks, local_rank=0, local_count=ranks, address="", port=0)
    with pytest.raises(ConfigurationError, match=why):
        shoal.lightning._check(trainer_in(tmp_path, **options), place)


@pytest.mark.parametrize(("kind", "missing"), [("train", "trainer.fit"), ("evaluate", r"trainer.validate\(model")])
def test_a_turn_that_does_not_do_its_task_is_an_error(tmp_path, server, monkeypatch, kind, missing):
    class Source:
        def __init__(self, *, evaluate):
            assert evaluate

        def next_task(self):
            return give(server, kind, 2)

    monkeypatch.setattr(shoal.lightning, "TaskSource", Source)
    with pytest.raises(ConfigurationError, match=f"round 2 did not call {missing}"):
        for _ in shoal.lightning.tasks(trainer_in(tmp_path)):
            pass


@pytest.mark.parametrize("tasks", [shoal.lightning.tasks, lambda trainer: shoal.client.tasks()])
def test_a_script_by_itself_trains_as_without_shoal(tmp_path, capsys, tasks):
    models = []
    for name in ("plain", "patched"):
        trainer, module = trainer_in(tmp_path / name), Classifier()
        module.load_state_dict(learner().init(3).params)
        models.append(module)
        if name == "patched":
            shoal.lightning.patch(trainer)
        for _ in [None] if name == "plain" else tasks(trainer):
            trainer.validate(module, loader(), verbose=False)
            trainer.fit(module, loader())
    assert_equal(dict(models[0].state_dict()), dict(models[1].state_dict()))
    names = [
        [str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")]
        for name in ("plain", "patched")
    ]
    assert names[0] == names[1]
    assert "the task to train in round 1 alone, 11 examples: loss" in capsys.readouterr().out
    assert loop.current_task() is None


def test_without_lightning_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    spec = importlib.util.find_spec("shoal.lightning")
    with pytest.raises(MissingExtraError, match=r"pip install 'shoal\[lightning\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_imperative_form_tells_the_trainer_its_task(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.client.imperative._source", [])
    monkeypatch.setattr("shoal.client.imperative._current", [])
    trainer, module = trainer_in(tmp_path), Classifier()
    shoal.lightning.patch(trainer)
    shoal.client.init(learner().init(3).params)
    while shoal.client.is_running():
        task = shoal.client.receive()
        trainer.validate(module, loader(), verbose=False)
        assert not differ(dict(module.state_dict()), task.params)
        trainer.fit(module, loader())
        assert task.replied
    assert loop.current_task() is None


def test_outside_of_all_tasks_a_patched_trainer_is_lightnings(tmp_path):
    trainer = trainer_in(tmp_path)
    shoal.lightning.patch(trainer)
    module = Classifier()
    before = {name: array.clone() for name, array in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        trainer.fit(module, loader())
    assert differ(before, module.state_dict())
