"""Sites train with a Lightning Trainer of the user's, whose loop is validate, fit, test, predict in every round."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning")

import shoal
import shoal.federation.job
from lightning_site import SIZES, Predicting, data_of, held_out
from shoal import trees
from shoal.types import Broadcast, LocalObjective, ModelState
from site_jobs import start_quickly
from support import assert_equal

SCRIPT = Path(__file__).parents[1] / "lightning_site.py"

ROUNDS, EPOCHS, MU = 3, 2, 0.5

STRATEGIES = {"site-1": "ddp", "site-2": "fsdp"}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lightning sites")]


def run(folder):
    """Runs a federation of two sites with two ranks each; returns its result, and what each rank wrote of its turns.

    The ranks are forked, so that Lightning is imported once; those that a user starts are in ``test_multi_gpu``.
    """
    environment = {"OMP_NUM_THREADS": "1"}
    job = shoal.Job(
        "lightning",
        script=SCRIPT,
        args=[json.dumps({"folder": str(folder), "epochs": EPOCHS})],
        model=Predicting,
        sites=[shoal.Site(name, devices=2, args=[kind], env=environment) for name, kind in STRATEGIES.items()],
        algorithm=shoal.FedProx(mu=MU),
        rounds=ROUNDS,
        accelerator="cpu",
    )
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        patched.setattr(shoal.federation.job, "start_script", start_quickly)
        warnings.simplefilter("ignore")  # Lightning's, which in a process of the user's are no errors
        result = job.run()
    ranks = [(site, rank) for site in STRATEGIES for rank in range(2)]
    return result, {key: json.loads((folder / f"{key[0]}-{key[1]}.json").read_text()) for key in ranks}


def learner(**settings):
    """Returns a learner of the same model, on one device with a site's whole data in a batch."""
    return shoal.LightningLearner(
        Predicting, trainer={"accelerator": "cpu"}, batch_size=None, epochs=EPOCHS, threads=1, **settings
    )


def average(*, keep_optimizer=True, proximal=MU):
    """Returns the model after the rounds of FedProx, written out."""
    learners = {site: learner(keep_optimizer=keep_optimizer) for site in SIZES}
    objective, model = LocalObjective(proximal=proximal), learner().init(0)
    for number in range(1, ROUNDS + 1):
        total = trees.zeros(model.params)
        for site, one in learners.items():
            broadcast = Broadcast(round=number, model=model, objective=objective)
            update = one.fit(broadcast, data_of(site), np.random.default_rng(0))
            trees.add_scaled(total, update.delta, SIZES[site] / sum(SIZES.values()))
        model = ModelState(params=trees.advance(model.params, total))
    return model.params


def distance(params, others):
    """Returns by how much any number differs at most."""
    return max(float((params[name] - others[name]).abs().max()) for name in params)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run in which the optimizers go on from round to round."""
    folder = tmp_path_factory.mktemp("kept")
    return folder, *run(folder)


def test_a_site_with_ddp_and_one_with_fsdp_train_as_one_device_each_with_optimizers_that_go_on(kept):
    _, result, _ = kept
    ours = average()
    assert_equal(result.last_params, ours, atol=1e-6)
    assert distance(ours, average(keep_optimizer=False)) > 1e-3
    assert distance(ours, average(proximal=0.0)) > 1e-3
    assert len(result.history) == ROUNDS


def test_what_validate_logs_is_the_metric_of_the_round(kept):
    _, result, _ = kept
    measured = learner().evaluate(ModelState(params=result.last_params), held_out())
    assert result.history[-1]["accuracy"] == pytest.approx(measured["accuracy"], abs=1e-6)
    assert all("accuracy" in record for record in result.history)


def test_every_rank_takes_every_turn_and_ends_with_the_same_model(kept):
    _, _, turns = kept
    for site in SIZES:
        first, second = turns[site, 0], turns[site, 1]
        asked = [(kind, number) for number in range(1, ROUNDS + 1) for kind in ("train", "evaluate")]
        assert [(turn["kind"], turn["round"]) for turn in first] == asked
        assert [turn["trained"] for turn in first] == [turn["trained"] for turn in second]
        assert all("loss" in turn["test"] and turn["predicted"] > 0 for turn in first)


def test_counters_go_on_while_the_epochs_are_a_rounds(kept):
    _, _, turns = kept
    trained = [turn for turn in turns["site-1", 0] if turn["kind"] == "train"]
    assert [turn["epochs"] for turn in trained] == [EPOCHS * number for number in range(1, ROUNDS + 1)]
    assert all(one["steps"] < other["steps"] for one, other in pairwise(trained))
    assert {turn["limit"] for turn in trained} == {EPOCHS}


def test_the_checkpoints_of_all_rounds_are_there_and_the_best_is_the_rounds_own(kept):
    folder, _, turns = kept
    for site in SIZES:
        for number in range(1, ROUNDS + 1):
            own = folder / "kept" / site / f"round-{number}"
            assert len(list(own.glob("*.ckpt"))) == 1, own
            best = [turn["best"] for turn in turns[site, 0] if turn["round"] == number]
            assert best == [f"{site}/round-{number}/{next(own.glob('*.ckpt')).name}"] * 2
