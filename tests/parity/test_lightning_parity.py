"""A Lightning module must train as its network does with the torch learner: alone, federated, on several ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import shoal
from lightning_modules import Classifier, fit, ranked
from shoal.errors import ConfigurationError
from shoal.types import LocalObjective
from support import BatchNormNet, Mlp, assert_equal, learner

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def objective(kind):
    plain = {
        "plain": LocalObjective(),
        "proximal": LocalObjective(proximal=0.5),
        "correction": LocalObjective(
            proximal=0.1, correction={name: torch.full_like(p, 0.03) for name, p in Mlp().named_parameters()}
        ),
    }[kind]
    named = {f"network.{name}": array for name, array in (plain.correction or {}).items()}
    return plain, LocalObjective(proximal=plain.proximal, correction=named or None)


def of_network(delta):
    return {name.removeprefix("network."): array for name, array in delta.items()}


@pytest.mark.parametrize(
    "settings", [{"epochs": 3}, {"steps": 8}, {"batch_size": None}], ids=["epochs", "steps", "whole"]
)
@pytest.mark.parametrize("kind", ["plain", "proximal", "correction"])
def test_one_device_is_the_torch_learner(kind, settings):
    torchs, lightnings = objective(kind)
    settings = {"batch_size": 4} | settings
    expected = fit(learner(optimizer=SGD, **settings), objective=torchs)
    ours = shoal.LightningLearner(Classifier, trainer={"accelerator": "cpu"}, **settings)
    update = fit(ours, objective=lightnings)
    assert_equal(of_network(update.delta), expected.delta, atol=1e-6)
    assert update.weight == expected.weight
    assert update.metrics == pytest.approx(expected.metrics, abs=1e-6)


def test_so_are_clipping_dropout_statistics_and_bf16():
    settings = {"batch_size": 4, "epochs": 2}
    theirs = learner(BatchNormNet, optimizer=SGD, clip_norm=0.3, devices=shoal.Devices(precision="bf16"), **settings)
    expected = fit(theirs, objective=LocalObjective(proximal=0.5))
    options = {"accelerator": "cpu", "gradient_clip_val": 0.3, "precision": "bf16-mixed"}
    ours = shoal.LightningLearner(partial(Classifier, BatchNormNet), trainer=options, **settings)
    update = fit(ours, objective=LocalObjective(proximal=0.5))
    assert_equal(of_network(update.delta), expected.delta, atol=1e-6)
    assert_equal(of_network(update.buffers), expected.buffers, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "correction"])
@pytest.mark.parametrize("count", [24, 21, 17], ids=["even", "uneven", "one left over"])
def test_two_ranks_are_one_device_with_twice_the_batch_size(count, kind):
    _, terms = objective(kind)
    expected = fit(
        shoal.LightningLearner(Classifier, trainer={"accelerator": "cpu"}, batch_size=8, epochs=2),
        count=count, objective=terms,
    )  # fmt: skip
    update = fit(ranked("ddp_fork", batch_size=4, epochs=2), count=count, objective=terms)
    assert_equal(update.delta, expected.delta, atol=1e-6)
    if count != 17:
        assert update.metrics == pytest.approx(expected.metrics, abs=1e-6)


def test_accumulated_batches_get_the_local_objective_once():
    terms = LocalObjective(proximal=0.5)
    whole = shoal.LightningLearner(Classifier, trainer={"accelerator": "cpu"}, batch_size=8, epochs=3)
    parts = {"accelerator": "cpu", "accumulate_grad_batches": 2}
    ours = shoal.LightningLearner(Classifier, trainer=parts, batch_size=4, epochs=3)
    assert_equal(fit(ours, count=24, objective=terms).delta, fit(whole, count=24, objective=terms).delta, atol=1e-6)


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


@pytest.mark.parametrize("engine", ["sequential", "process", "auto"])
def test_federated_digits_end_as_with_the_torch_learner(engine):
    train, test = shoal.data.digits()
    clients = shoal.data.partition(train, shoal.data.IID(clients=5))
    run = partial(shoal.federate, clients=clients, rounds=3, algorithm=shoal.FedProx(mu=0.1), evaluate=test)
    expected = run(learner(network, optimizer=SGD, batch_size=32), engine="sequential")
    ours = shoal.LightningLearner(
        partial(Classifier, network), trainer={"accelerator": "cpu"}, batch_size=32, threads=1
    )
    result = run(ours, engine=engine)
    assert_equal(of_network(result.params), expected.params, atol=1e-6)
    assert result.history[-1]["accuracy"] == pytest.approx(expected.history[-1]["accuracy"])


def test_engines_that_cannot_hold_it_say_so():
    clients = shoal.data.partition(shoal.data.digits()[0], shoal.data.IID(clients=5))
    ours = shoal.LightningLearner(partial(Classifier, network), trainer={"accelerator": "cpu"})
    with pytest.raises(ConfigurationError, match="vectorized"):
        shoal.federate(ours, clients, rounds=1, engine="vectorized")
    with pytest.raises(ConfigurationError, match="several devices, each in a process of its own: use 'sequential'"):
        shoal.federate(ranked("ddp_fork", partial(Classifier, network)), clients, rounds=1, engine="process")
