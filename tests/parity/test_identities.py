"""Federations that must equal something simpler."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import shoal
from models import MODELS, images
from shoal.data import Population
from shoal.engines import VectorizedEngine
from shoal.federation.cohorts import sample_cohort
from shoal.randomness import generator
from support import BatchNormNet, Mlp, assert_equal, batch_indices, differ, learner, population, samples


def seeded(model, seed):
    torch.manual_seed(int(seed))
    return model()


def test_fedavg_of_full_batches_is_gradient_descent():
    clients = population((7, 12, 5, 9, 20))
    ours = learner(lr=0.5, batch_size=None)
    result = shoal.federate(ours, clients, rounds=20)
    module = seeded(Mlp, 0)
    inputs, targets = map(torch.as_tensor, clients.dataset.take(np.arange(53)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        optimizer.step()
    assert_equal(result.params, module.state_dict(), atol=1e-6)


@pytest.mark.parametrize("model", [Mlp, BatchNormNet])
def test_fedprox_without_its_term_is_fedavg_exactly(model):
    def run(method):
        return shoal.federate(learner(model), population(), rounds=4, cohort=3, algorithm=method).params

    assert_equal(run(shoal.FedProx(mu=0.0)), run(shoal.FedAvg()))
    assert differ(run(shoal.FedProx(mu=1.0)), run(shoal.FedAvg()))


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.3), partial(torch.optim.AdamW, lr=0.05)])
@pytest.mark.parametrize("model", [Mlp, BatchNormNet])
def test_one_client_is_plain_training_exactly(model, optimizer):
    """Ten rounds of one epoch are ten epochs of the plain loop whose optimizer starts anew with each."""
    data = samples(30)
    ours = learner(model, optimizer=optimizer, batch_size=8)
    result = shoal.federate(ours, [data], rounds=10, seed=4, engine="sequential")
    module = seeded(model, 4).train()
    for number in range(1, 11):
        made = optimizer(module.parameters())
        rng = generator(4, "fit", round=number, client=0)
        torch.manual_seed(int(rng.integers(2**63)))
        for indices in batch_indices(30, batch_size=8, epochs=1, steps=None, rng=rng):
            inputs, targets = map(torch.as_tensor, data.take(indices))
            made.zero_grad()
            F.cross_entropy(module(inputs), targets).backward()
            made.step()
    expected = module.state_dict()
    trained = [name for name in expected if not name.endswith("num_batches_tracked")]
    assert_equal({name: result.params[name] for name in trained}, {name: expected[name] for name in trained})


def test_equal_seeds_give_equal_parameters_and_others_do_not():
    def run(seed):
        return shoal.federate(learner(BatchNormNet), population(), rounds=3, cohort=2, seed=seed).params

    assert_equal(run(1), run(1))
    assert differ(run(1), run(2))


def test_cohorts_do_not_depend_on_what_ran_before():
    alone = sample_cohort(1000, 10, seed=5, round=7)
    for number in range(1, 7):
        sample_cohort(1000, 10, seed=5, round=number)
    assert sample_cohort(1000, 10, seed=5, round=7) == alone
    assert sample_cohort(1000, 10, seed=5, round=8) != alone
    assert sample_cohort(1000, 10, seed=6, round=7) != alone


def test_every_client_is_sampled_equally_often():
    drawn = np.bincount(np.concatenate([sample_cohort(20, 5, seed=0, round=r) for r in range(4000)]), minlength=20)
    assert drawn.sum() == 20_000
    assert np.abs(drawn - 1000).max() < 5 * np.sqrt(1000 * 0.75)  # five standard deviations of the binomial


def test_clients_given_one_by_one_are_the_partition_of_the_whole():
    clients = population()
    apart = Population.from_datasets([clients[k].take(np.arange(len(clients[k]))) for k in range(5)])
    ours = learner(BatchNormNet)
    assert_equal(
        shoal.federate(ours, apart, rounds=3, cohort=2).params, shoal.federate(ours, clients, rounds=3, cohort=2).params
    )


def stacked(model, clients, block_size):
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    ours = shoal.TorchLearner(MODELS[model], loss=F.cross_entropy, optimizer=momentum, batch_size=4)
    return shoal.federate(ours, clients, rounds=8, cohort=8, engine=VectorizedEngine(block_size=block_size)).params


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn", "group_norm", "transformer", "lstm"])
def test_the_block_size_makes_no_difference_to_the_last_bit(model):
    clients = images((9,) * 11)
    expected = stacked(model, clients, 8)
    for size in (1, 3, None):
        assert_equal(stacked(model, clients, size), expected)


@pytest.mark.parametrize("model", ["batch_norm", "cnn"])
def test_where_it_would_the_size_is_not_left_to_chance(model):
    clients = images((9, 13, 6, 12, 12, 9, 2, 13, 8, 7))
    assert_equal(stacked(model, clients, None), stacked(model, clients, 20))
