"""What every engine must do. An engine joins by its name in ``ENGINES``."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import shoal
from models import MODELS, Transformer, dropout, images
from shoal import trees
from shoal.data import ArrayDataset, Population
from shoal.engines import ENGINES, CohortSum, DistributedEngine, SequentialEngine, choose_engine
from shoal.errors import ConfigurationError
from shoal.types import Broadcast, LocalObjective
from support import BatchNormNet, Mlp, assert_equal, learner, population, tasks

every_engine = pytest.mark.parametrize("engine", ENGINES)

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
}
SIZES = {"equal": (8, 8, 8, 8, 8), "ragged": (9, 13, 6, 2, 10), "one": (1, 9, 1, 4, 1)}
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
METHODS = {"fedavg": shoal.FedAvg(), "fedprox": shoal.FedProx(mu=0.5)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(engine):
    """Returns an engine of its name; of those that run another one, on the reference, which they must equal exactly."""
    return DistributedEngine("sequential") if engine == "distributed" else ENGINES[engine]()


def trained(engine, model, optimizer, sizes, method, dtype):
    make = MODELS[model] if dtype == torch.float32 else lambda: MODELS[model]().double()
    ours = shoal.TorchLearner(make, loss=F.cross_entropy, optimizer=OPTIMIZERS[optimizer], batch_size=4, epochs=2)
    clients = images(sizes, np.float32 if dtype == torch.float32 else np.float64)
    return shoal.federate(ours, clients, rounds=2, cohort=4, algorithm=METHODS[method], engine=made(engine)).params


REFERENCES: dict[tuple, dict] = {}


def cases():
    """Yields models with what they are trained with: each of them with each, in both precisions.

    In float64, where rounding hides nothing, a model has every pair of optimizer and sizes; in float32 every optimizer.
    The methods take turns, for the next model the other way round.
    """
    for number, model in enumerate(MODELS):
        # Of a batch of one sample BatchNorm has 6 × 6 values yet, but their variance is ill-conditioned.
        kinds = [kind for kind in SIZES if model != "batch_norm" or kind != "one"]
        for (row, optimizer), (column, sizes) in itertools.product(enumerate(OPTIMIZERS), enumerate(kinds)):
            place = number + row + column
            method = list(METHODS)[place % 2]
            yield model, "fp64", optimizer, sizes, method
            if place % len(kinds) == 0:
                yield model, "fp32", optimizer, sizes, method


CASES = [
    # In one process of those that share the tests, so that the reference is trained in one of them alone.
    pytest.param(*case, marks=pytest.mark.xdist_group("{} in {}".format(*case)))
    for case in cases()
]


def reference(*case):
    """The same cases for every engine: the reference is trained once for each."""
    if case not in REFERENCES:
        REFERENCES[case] = trained("sequential", *case)
    return REFERENCES[case]


@every_engine
@pytest.mark.parametrize(("model", "precision", "optimizer", "sizes", "method"), CASES)
def test_it_ends_where_the_reference_does(engine, model, precision, optimizer, sizes, method):
    case = (model, optimizer, SIZES[sizes], method, PRECISIONS[precision])
    expected = reference(*case)
    if engine == "sequential":
        again = trained("sequential", *case)
        assert_equal(again, expected)
        return
    close = 1e-9 if precision == "fp64" else 1e-4 if optimizer == "adamw" else 1e-5
    assert_equal(trained(engine, *case), expected, atol=0 if engine in ("process", "distributed") else close)


@contextlib.contextmanager
def opened(engine, learner, clients):
    ours = made(engine)
    ours.open(learner, clients)
    with contextlib.closing(ours):
        yield ours


def assert_same_update(update, expected):
    """A block's update is in the parameters' dtype, and one client's alone in float64."""
    for tree, other in ((update.delta, expected.delta), (update.buffers, expected.buffers)):
        assert_equal(
            {name: array.double() for name, array in tree.items()},
            {name: array.double() for name, array in other.items()},
            atol=1e-6,
        )


def run(engine, learner, cohort=(0, 1, 2, 3, 4), objective=None, clients=None):
    """Returns each client's result, those of a block cut apart."""
    clients = clients or population()
    found = {}
    with opened(engine, learner, clients) as ours:
        broadcast = Broadcast(round=1, model=learner.init(0), objective=objective or LocalObjective())
        for result in ours.run(learner, broadcast, tasks(clients, cohort)):
            if isinstance(result, shoal.engines.BlockResult):
                for row, client in enumerate(result.clients):
                    update = result.updates.row(row)
                    kept = {part: trees.copy(getattr(update, part)) for part in ("delta", "buffers", "metrics")}
                    update = dataclasses.replace(update, **kept)  # the next block has the same memory
                    found[client] = shoal.engines.ClientResult(client=client, update=update)
            else:
                found[result.client] = result
    return found


@every_engine
@pytest.mark.parametrize("model", [Mlp, BatchNormNet])
@pytest.mark.parametrize(
    "objective",
    [
        LocalObjective(),
        LocalObjective(proximal=0.5),
        LocalObjective(
            proximal=0.1, correction={name: torch.full_like(p, 0.01) for name, p in Mlp().named_parameters()}
        ),
    ],
    ids=["plain", "proximal", "correction"],
)
def test_every_client_equals_the_reference(engine, model, objective):
    if objective.correction and model is BatchNormNet:
        objective = LocalObjective(
            correction={name: torch.full_like(p, 0.01) for name, p in BatchNormNet().named_parameters()}
        )
    ours = learner(model, clip_norm=0.4, train_metrics=True)
    found = run(engine, ours, objective=objective)
    broadcast = Broadcast(round=1, model=ours.init(0), objective=objective)
    for expected in SequentialEngine().run(ours, broadcast, tasks(population(), range(5))):
        update = found[expected.client].update
        assert_same_update(update, expected.update)
        assert update.weight == expected.update.weight
        assert {name: float(value) for name, value in update.metrics.items()} == pytest.approx(expected.update.metrics)


@every_engine
@pytest.mark.parametrize("model", [BatchNormNet, dropout, partial(Transformer, 0.2)], ids=["small", "cnn", "attention"])
def test_noise_is_the_clients_own(engine, model):
    ours = learner(model)
    clients = population() if model is BatchNormNet else images((9, 13, 6, 2, 10))
    together = run(engine, ours, clients=clients)
    backwards = run(engine, ours, cohort=(4, 3, 2, 1, 0), clients=clients)
    alone = run(engine, ours, cohort=(3,), clients=clients)
    expected = run("sequential", ours, clients=clients)
    for other in (backwards, alone, expected):
        assert_same_update(together[3].update, other[3].update)


class Broken(ArrayDataset):
    """One sample cannot be read."""

    def take(self, indices):
        if 21 in indices:  # the third client's
            raise RuntimeError("the third client's own fault")
        return super().take(indices)


def with_a_broken_client():
    whole = population()
    data = Broken(whole.dataset.inputs, whole.dataset.targets())
    data.__class__ = Broken
    return Population(data, np.arange(len(data)), np.concatenate([[0], np.cumsum(whole.sizes)]))


@every_engine
def test_an_exception_is_its_clients_result_and_the_others_go_on(engine):
    found = run(engine, learner(), clients=with_a_broken_client())
    assert {client for client, result in found.items() if result.error} == {2}
    assert isinstance(found[2].error, RuntimeError)
    assert "the third client's own fault" in str(found[2].error)
    expected = run("sequential", learner())
    for client in (0, 1, 3, 4):
        assert_same_update(found[client].update, expected[client].update)


@every_engine
def test_a_client_that_diverges_is_left_out_of_the_sum(engine):
    ours = learner(lr=0.1)
    whole = population()
    inputs = whole.dataset.inputs.copy()
    inputs[20] = np.inf  # the third client's
    clients = Population(
        ArrayDataset(inputs, whole.dataset.targets()), np.arange(len(inputs)), np.cumsum([0, *whole.sizes])
    )
    with opened(engine, ours, clients) as opened_engine:
        model = ours.init(0)
        summed = CohortSum(model, lambda update: update.weight)
        for result in opened_engine.run(ours, Broadcast(round=1, model=model), tasks(clients, range(5))):
            summed.add(result)
        summed.settle()
    assert list(summed.failures) == [2]
    assert "NaN or infinity" in str(summed.failures[2])
    assert sorted(summed.examples) == [0, 1, 3, 4]
    expected = CohortSum(model, lambda update: update.weight)
    for result in SequentialEngine().run(ours, Broadcast(round=1, model=model), tasks(clients, (0, 1, 3, 4))):
        expected.add(result)
    assert_equal(summed.total.mean().delta, expected.total.mean().delta, atol=1e-6)


@every_engine
def test_it_is_found_by_its_name_and_auto_says_which_and_why(engine):
    for name in (engine, "auto"):
        chosen, line = choose_engine(name, learner(), population())
        with contextlib.closing(chosen):
            assert chosen.name in line
            assert name in ("auto", chosen.name)
    with pytest.raises(ConfigurationError, match=f"unknown engine '{engine[:-1]}'; did you mean"):
        choose_engine(engine[:-1], learner(), population())
