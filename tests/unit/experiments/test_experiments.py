from __future__ import annotations

import dataclasses

import pytest
import torch

import shoal
from shoal.data.catalogue.fashion_mnist import DEBIAN
from shoal.errors import ConfigurationError
from shoal.experiments import build, load, parse_settings
from support import learner, population


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        "synthetic",
        pytest.param(
            "fashion_mnist",
            marks=pytest.mark.skipif(not DEBIAN.is_dir(), reason="the package dataset-fashion-mnist is not installed"),
        ),
    ],
)
def test_a_built_in_experiment_learns(name):
    experiment = build(load(name), {"clients": "20", "rounds": "2", "cohort": "2"})
    shorter = dataclasses.replace(experiment, learner=dataclasses.replace(experiment.learner, epochs=1, steps=30))
    result = shoal.run_experiment(shorter)
    assert len(result.history) == 2
    assert torch.isfinite(torch.tensor(result.history[-1]["loss"]))


def test_the_demo_reaches_its_accuracy():
    result = shoal.run_experiment(build(load("digits"), {}))
    assert result.history[-1]["accuracy"] >= 0.93
    assert len(result.history) == 30


def made(clients: int = 3, rate: float | None = None, label: str = "x", fast: bool = False, seed: int = 0):
    made.called = {"clients": clients, "rate": rate, "label": label, "fast": fast, "seed": seed}
    return shoal.Experiment(learner=learner(), clients=population(), rounds=4, seed=seed)


@pytest.mark.parametrize(
    ("pairs", "called"),
    [
        (["clients=5"], {"clients": 5}),
        (["rate=0.5"], {"rate": 0.5}),
        (["rate=none"], {"rate": None}),
        (["rate=2"], {"rate": 2.0}),
        (["label=a=b"], {"label": "a=b"}),
        (["fast=true"], {"fast": True}),
        (["seed=7"], {"seed": 7}),
    ],
)
def test_settings_reach_the_function_with_its_types(pairs, called):
    build(made, parse_settings(pairs))
    assert made.called == {"clients": 3, "rate": None, "label": "x", "fast": False, "seed": 0} | called


def test_settings_reach_the_fields():
    settings = ["rounds=9", "target=none", "max_seconds=2.5", "tensorboard=false", "seed=3", "algorithm=FedAdam"]
    experiment = build(
        made, parse_settings([*settings, "algorithm.beta1=0.5", "learner.batch_size=none", "learner.clip_norm=1"])
    )
    assert (experiment.rounds, experiment.target, experiment.max_seconds, experiment.seed) == (9, None, 2.5, 3)
    assert experiment.tensorboard is False
    assert experiment.algorithm == shoal.FedAdam(beta1=0.5)
    assert (experiment.learner.batch_size, experiment.learner.clip_norm) == (None, 1.0)


def test_settings_reach_a_named_engine():
    settings = ["engine=process", "engine.clients_per_process=10", "engine.client_timeout=2.5"]
    engine = build(made, parse_settings(settings)).engine
    assert isinstance(engine, shoal.engines.ProcessEngine)
    assert (engine.max_concurrent, engine.clients_per_process, engine.client_timeout) == (None, 10, 2.5)
    assert build(made, parse_settings(["engine.block_size=7", "engine=vectorized"])).engine.block_size == 7
    assert build(made, parse_settings(["engine=vectorized", "engine.block_size=none"])).engine.block_size is None


def with_its_own_engine():
    return dataclasses.replace(made(), engine=shoal.engines.VectorizedEngine(3))


def test_an_engine_that_the_experiment_makes_is_not_swapped_for_another():
    with pytest.raises(ConfigurationError, match=r"engine.block_size was given, but the experiment makes its engine"):
        build(with_its_own_engine, parse_settings(["engine.block_size=7"]))
    assert build(with_its_own_engine, {"engine": "vectorized", "engine.block_size": "7"}).engine.block_size == 7


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["engine.block_size=5"], "belongs to one engine, and auto chooses among several: name it with --engine"),
        (["engine=auto", "engine.block_size=5"], "engine.block_size belongs to one engine, and auto chooses"),
        (["engine=vectorised", "engine.block_size=5"], "unknown engine 'vectorised'; did you mean 'vectorized'"),
        (["engine=vectorized", "engine.max_concurrent=5"], "engine vectorized 'max_concurrent'; known: block_size"),
        (
            ["engine=process", "engine.max_concurent=5"],
            "of engine process 'max_concurent'; did you mean 'max_concurrent'",
        ),
        (["engine=sequential", "engine.max_concurrent=5"], "but engine sequential has no settings"),
        (["engine=process", "engine.max_concurrent=many"], "engine.max_concurrent takes none or int, not 'many'"),
        (["engine=process", "engine.max_concurrent=0"], "max_concurrent must be at least 1, not 0"),
        (["clients=many"], "clients takes int, not 'many'"),
        (["rate=fast"], "rate takes none or float, not 'fast'"),
        (["fast=1"], "fast takes bool, not '1'"),
        (["cleints=3"], "unknown setting 'cleints'; did you mean 'clients'"),
        (["learner.epoch=3"], "unknown setting 'learner.epoch'; did you mean 'learner.epochs'"),
        (["learner.model=3"], "unknown setting 'learner.model'"),
        (["algorithm=sgd"], "unknown algorithm 'sgd'"),
        (["=3"], "--set takes key=value, not '=3'"),
        (["learner.batch_size=0"], "batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_set_is_refused(pairs, message):
    with pytest.raises(ConfigurationError, match=message):
        build(made, parse_settings(pairs))


def test_an_experiment_must_be_one():
    with pytest.raises(ConfigurationError, match="must return a shoal.Experiment, not int"):
        build(lambda: 3, {})

    def needs(folder: str):
        return made()

    with pytest.raises(ConfigurationError, match="the experiment needs --set folder="):
        build(needs, {})
