from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import data
from shoal.data import IID, ArrayDataset, Dirichlet, Natural, QuantitySkew, Shards, partition
from shoal.errors import ConfigurationError, DataError

ALPHAS = st.sampled_from([1e-3, 0.05, 0.3, 1.0, 10.0, 1e3])


def labelled(count, classes=5, seed=0):
    labels = np.random.default_rng(seed).integers(classes, size=count)
    return ArrayDataset(np.arange(count)[:, None], labels, classes=classes)


def members(population):
    return [population[k].take(np.arange(len(population[k])))[0][:, 0].tolist() for k in range(len(population))]


@st.composite
def partitioners(draw):
    clients = draw(st.integers(1, 12))
    min_size = draw(st.integers(1, 4))
    kind = draw(st.sampled_from([IID, Dirichlet, QuantitySkew, Shards]))
    if kind in (Dirichlet, QuantitySkew):
        return kind(clients=clients, alpha=draw(ALPHAS), min_size=min_size)
    if kind is Shards:
        return Shards(clients=clients, shards_per_client=draw(st.integers(1, 4)))
    return IID(clients=clients, min_size=min_size)


@given(partitioners(), st.integers(50, 300), st.integers(0, 1000))
def test_every_sample_goes_to_exactly_one_client_and_none_is_too_small(partitioner, count, seed):
    population = partition(labelled(count), partitioner, seed=seed)
    parts = members(population)
    assert sorted(sample for part in parts for sample in part) == list(range(count))
    assert len(population) == partitioner.clients
    assert min(map(len, parts)) >= partitioner.min_size
    assert [len(part) for part in parts] == population.sizes.tolist()
    assert all(part == sorted(part) for part in parts)
    assert members(partition(labelled(count), partitioner, seed=seed)) == parts


@pytest.mark.parametrize(
    "partitioner",
    [IID(clients=7), Dirichlet(clients=7, alpha=0.5), QuantitySkew(clients=7, alpha=1.0), Shards(clients=7)],
)
def test_another_seed_is_another_partition(partitioner):
    one, other = (partition(labelled(200), partitioner, seed=seed) for seed in (0, 1))
    assert members(one) != members(other)
    assert one.describe() != other.describe()


def test_iid_sizes_differ_by_one_at_most():
    sizes = partition(labelled(103), IID(clients=10)).sizes
    assert sorted(sizes.tolist()) == [10] * 7 + [11] * 3


def test_dirichlet_goes_from_one_label_each_to_all_alike():
    def labels_of(alpha):
        population = partition(labelled(20_000, classes=10), Dirichlet(clients=10, alpha=alpha))
        return population.label_counts(range(10))

    skewed, alike = labels_of(1e-3), labels_of(1e4)
    assert np.sort(skewed, axis=0)[-1].sum() > 0.99 * 20_000  # nearly all of a label lies with one client
    assert np.abs(alike / alike.sum(axis=0) - 0.1).max() < 0.01


def test_dirichlet_shares_have_the_right_spread():
    """The share of a label that a client has is Beta(α, (n − 1) α): its variance is known."""
    shares = np.concatenate(
        [
            (counts := partition(labelled(5000, classes=1), Dirichlet(clients=5, alpha=0.5), seed=seed).sizes) / 5000
            for seed in range(400)
        ]
    )
    a, b = 0.5, 2.0
    assert counts.sum() == 5000
    assert shares.var() == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), rel=0.1)


def test_topping_up_takes_from_the_largest_only():
    dataset = labelled(100, classes=1)
    before = partition(dataset, Dirichlet(clients=5, alpha=0.05), seed=8)
    sizes = partition(dataset, Dirichlet(clients=5, alpha=0.05, min_size=10), seed=8).sizes
    assert before.sizes.min() < 10 == sizes.min()
    gave = np.flatnonzero(sizes < before.sizes)
    kept = np.setdiff1d(np.flatnonzero(before.sizes >= 10), gave)
    assert all(before.sizes[kept] <= sizes[gave].max() + 1)


def test_a_client_of_shards_has_as_few_labels_as_shards():
    labels = np.repeat(np.arange(10), 60)
    population = partition((labels[:, None], labels), Shards(clients=20, shards_per_client=2))
    counts = population.label_counts(range(20))
    assert population.sizes.tolist() == [30] * 20
    assert (counts > 0).sum(axis=1).max() <= 2


def test_natural_ids_are_clients_by_name():
    ids = np.array(["bo", "al", "bo", "cy", "al", "bo"])
    population = partition(ArrayDataset(np.arange(6)[:, None], np.zeros(6, int), ids=ids), Natural())
    assert [population.name(k) for k in range(3)] == ["al", "bo", "cy"]
    assert members(population) == [[1, 4], [0, 2, 5], [3]]


@pytest.mark.parametrize(
    ("dataset", "partitioner", "message"),
    [
        (labelled(5), IID(clients=10), "5 samples cannot give 10 clients 1 each: use at most 5 clients"),
        (labelled(50), Dirichlet(clients=10, alpha=1, min_size=6), "cannot give 10 clients 6 each: use at most 8"),
        (labelled(10), Shards(clients=6, shards_per_client=2), "cut into 12 shards: use at most 5 clients"),
        (labelled(10), Natural(), "no natural ids"),
        (
            ArrayDataset(np.zeros(3), np.zeros(3, int), ids=["a", "a", "b"]),
            Natural(min_size=2),
            "b has 1 samples, fewer than min_size=2",
        ),
        ((np.zeros(9), np.zeros(9)), Dirichlet(clients=2, alpha=1), "float64 of shape .9,.; use IID"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(dataset, partitioner, message):
    with pytest.raises(DataError, match=message):
        partition(dataset, partitioner)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IID(clients=0), "IID: clients must be ≥ 1, not 0"),
        (lambda: IID(clients=2, min_size=0), "min_size must be ≥ 1"),
        (lambda: Dirichlet(clients=2, alpha=0.0), "alpha must be > 0"),
        (lambda: Dirichlet(clients=2, alpha=float("nan")), "alpha must be > 0"),
        (lambda: QuantitySkew(clients=2, alpha=-1.0), "alpha must be > 0"),
        (lambda: Shards(clients=2, shards_per_client=0), "shards_per_client must be ≥ 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    "partitioner",
    [
        IID(clients=100_000),
        Dirichlet(clients=100_000, alpha=0.3),
        QuantitySkew(clients=100_000, alpha=0.5),
        Shards(clients=100_000),
    ],
)
def test_100_000_clients_cost_index_memory_only(partitioner):
    dataset = labelled(200_000, classes=10)
    tracemalloc.start()
    started = time.perf_counter()
    population = partition(dataset, partitioner)
    seconds = time.perf_counter() - started
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert population.sizes.min() >= 1
    assert population.sizes.sum() == 200_000
    assert held < 8 * 1.1 * (100_000 + 200_000)  # eight bytes for a client, eight for a sample
    assert seconds < 60  # a bound against loops over clients, far from what it takes


def test_synthetic_is_seeded_and_its_knobs_spread_the_clients():
    population, test = data.synthetic(1.0, 1.0, clients=12, seed=3)
    again, _ = data.synthetic(1.0, 1.0, clients=12, seed=3)
    assert len(population) == 12
    assert members(population) == members(again)
    assert population.sizes.min() >= 45
    assert test.inputs.shape[1] == 60
    assert test.inputs.dtype == np.float32
    population.check()

    def spread(beta):
        clients, _ = data.synthetic(0.0, beta, clients=40, seed=1)
        centres = [clients[k].take(np.arange(len(clients[k])))[0].mean() for k in range(40)]
        return np.std(centres)

    assert spread(4.0) > 3 * spread(0.0)


@pytest.mark.parametrize("arguments", [(-1.0, 0.0), (0.0, float("nan"))])
def test_synthetic_refuses_negative_variances(arguments):
    with pytest.raises(ConfigurationError, match="must be ≥ 0"):
        data.synthetic(*arguments)
