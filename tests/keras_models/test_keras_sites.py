"""Keras at sites: a script of the user's own, and a learner in its place, on one device and on several.

A learner's jobs run in processes of their own, because they are forked before TensorFlow starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import shoal
from keras_reference import clients
from keras_site import made
from shoal.data import Subset
from shoal.errors import ConfigurationError, SiteError
from shoal.types import LocalObjective, ModelState

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "keras_site.py"


def job(model=made, devices=1, **settings):
    """Returns a job of two sites with the script."""
    sites = [shoal.Site(f"site-{client}", config={"client": client}) for client in (0, 1)]
    return shoal.Job("keras", script=SCRIPT, args=[str(devices)], model=model, sites=sites, rounds=3, **settings)


def learned(model=made, **settings):
    """Returns what a learner gives with the same examples."""
    data = [Subset(clients()[client], np.arange(6)) for client in (0, 1)]
    learner = shoal.KerasLearner(model, batch_size=None, epochs=2)
    return shoal.federate(learner, data, rounds=3, engine="sequential", **settings)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_script_with_fit_has_the_objective_of_the_algorithm(devices):
    model = partial(made, statistics=devices == 1)  # a BatchNorm sees each device's part by itself
    method = shoal.FedProx(mu=3.0)
    plain, expected, ours = (
        learned(model),
        learned(model, algorithm=method),
        job(model, devices, algorithm=method).run(),
    )
    for name, array in expected.params.items():
        np.testing.assert_allclose(ours.params[name], array, atol=1e-5, rtol=0, err_msg=name)
    assert max(np.abs(plain.params[name] - expected.params[name]).max() for name in plain.params) > 0.1
    means = [array for name, array in ours.params.items() if "moving_mean" in name]
    assert len(means) == (devices == 1)
    assert all(np.abs(array).max() > 0.01 for array in means)


def test_the_objective_leaves_with_its_round():
    model = made()
    state = ModelState(params={one.path: one.numpy() + 1 for one in model.weights})

    def task(objective):
        return shoal.client.Task(
            kind="train", round=1, rounds=1, site="site", config={}, model=state, objective=objective
        )

    inputs, targets = clients()[0].take(np.arange(6))
    task(LocalObjective()).load(model)
    before = model.evaluate(inputs, targets, verbose=0)
    for variable in model.trainable_variables:
        assert variable.regularizer is None or "L2" in type(variable.regularizer).__name__
    correction = {one.path: np.full(one.shape, 2.0, np.float32) for one in model.trainable_variables}
    task(LocalObjective(proximal=0.5, correction=correction)).load(model)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1)
    moved = model.evaluate(inputs, targets, verbose=0)
    values = np.concatenate([one.numpy().ravel() for one in model.trainable_variables])
    task(LocalObjective()).load(model)
    assert model.evaluate(inputs, targets, verbose=0) == pytest.approx(before, abs=1e-6)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1)
    without = model.evaluate(inputs, targets, verbose=0)
    assert moved - without == pytest.approx(2.0 * values.sum() + 0.25 * len(values) * 0.01, rel=1e-4)
    with pytest.raises(ConfigurationError, match="leave task.apply out"):
        task(LocalObjective()).apply(0.0, model)


def test_another_model_is_refused_by_the_names_of_its_arrays():
    model = made()
    task = shoal.client.Task(kind="train", round=1, rounds=1, site="site", config={}, model=ModelState(params={"a": 1}))
    with pytest.raises(ConfigurationError, match="has unknown a; layers without a name are counted"):
        task.load(model)


def test_a_site_whose_model_is_another_is_named():
    with pytest.raises(SiteError, match=r"site-[01]: rank 0 .* ended with exit code 1"):
        job(model={"kernel": np.zeros(3, np.float32)}).run()


def learners(*strategies, **settings):
    """Returns what a job of learners tells, by the strategy of its sites."""
    program = Path(__file__).parents[1] / "keras_site_learners.py"
    found = {}
    for strategy in strategies:
        done = subprocess.run(
            [sys.executable, program, strategy, json.dumps(settings)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found[strategy] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def untouched():
    """What jobs tell that nothing happens to."""
    return learners("single", "mirrored", "multiworker")


def test_learners_at_sites_are_one_device_whatever_their_strategy(untouched):
    single = untouched["single"]
    for strategy in ("mirrored", "multiworker"):
        told = untouched[strategy]
        for name, array in single["params"].items():
            np.testing.assert_allclose(told["params"][name], array, atol=1e-5, rtol=0)
        assert told["history"] == pytest.approx(single["history"], abs=1e-5)
        assert told["measured"] == pytest.approx(single["measured"], abs=1e-5)


@pytest.mark.parametrize("strategy", ["mirrored", "multiworker"])
def test_a_rank_that_is_killed_is_started_again_and_changes_nothing(untouched, strategy):
    found = learners(strategy, kill=1)[strategy]
    assert found.pop("killed") > 0
    assert found | {"killed": 0} == untouched[strategy]


def test_a_script_makes_workers_of_its_own_and_has_no_torch():
    script = Path(__file__).parents[1] / "keras_worker_site.py"
    devices = shoal.Devices("multiworker", count=2, accelerator="cpu")
    sites = [shoal.Site(f"site-{client}", devices=devices, config={"client": client}) for client in (0, 1)]
    model = partial(made, statistics=False)
    ours = shoal.Job("workers", script=script, model=model, sites=sites, rounds=3).run()
    expected = learned(model)
    for name, array in expected.params.items():
        np.testing.assert_allclose(ours.params[name], array, atol=1e-5, rtol=0, err_msg=name)


def test_a_learner_is_refused_where_tensorflow_has_started_or_devices_are_torchs():
    sites = [shoal.Site("site-1", data=clients()[0])]
    learner = shoal.KerasLearner(made)
    learner.init(0)
    with pytest.raises(ConfigurationError, match="a process forked from it would wait for its threads for ever"):
        shoal.Job("keras", learner=learner, sites=sites, rounds=1).run()
    with pytest.raises(ConfigurationError, match="strategy 'ddp' is torch's; a Keras model trains with 'single', 'mi"):
        shoal.Job("keras", learner=learner, sites=[shoal.Site("a", devices=2, data=clients()[0])], rounds=1)
