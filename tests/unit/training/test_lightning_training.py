"""``shoal.train`` with a LightningModule."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning")

import shoal
from lightning_modules import Scheduled
from shoal.errors import ConfigurationError, RunInterrupted
from shoal.randomness import generator
from shoal.types import Broadcast
from support import samples, timeless


def learner(**options):
    return shoal.LightningLearner(Scheduled, trainer={"accelerator": "cpu"}, batch_size=16, **options)


class Interrupt(shoal.TrainingCallback):
    def on_epoch_end(self, record):
        if record["epoch"] == 1:
            raise KeyboardInterrupt


def test_a_training_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    asked = {"epochs": 3, "evaluate": samples(21, seed=1)}
    whole = shoal.train(learner(), samples(40), **asked, run_dir=tmp_path / "whole")
    with pytest.raises(RunInterrupted, match="stopped after step 1; the state is saved"):
        shoal.train(learner(), samples(40), **asked, run_dir=tmp_path / "cut", callbacks=[Interrupt()])
    resumed = shoal.train(learner(), samples(40), **asked, run_dir=tmp_path / "cut", resume=True)
    for name, array in whole.last_params.items():
        assert (array == resumed.last_params[name]).all()
    assert timeless(tmp_path / "whole" / "metrics.jsonl") == timeless(tmp_path / "cut" / "metrics.jsonl")
    assert [record["epoch"] for record in resumed.history] == [1, 2, 3]


def test_an_epoch_is_that_of_a_client():
    own = learner()
    start = own.init(0)
    update = own.fit(Broadcast(round=0, model=start), samples(40), generator(0, "fit", round=1))
    result = shoal.train(learner(), samples(40), epochs=1)
    for name, delta in update.delta.items():
        assert (start.params[name].double() + delta).to(start.params[name].dtype).equal(result.last_params[name])


def test_what_belongs_to_the_module_is_refused():
    with pytest.raises(ConfigurationError, match="a LightningModule makes its own optimizers"):
        shoal.train(learner(), samples(40), epochs=1, scale_lr=True)
