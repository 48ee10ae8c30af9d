"""Which worker trains which clients, and what is learned from the time it took."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.engines.shares import SLOWEST, CostEstimate, Costs, Share

sizes = st.lists(st.integers(1, 500), min_size=1, max_size=60)
speeds = st.lists(st.floats(SLOWEST, 5.0), min_size=1, max_size=6).map(tuple)
costs = st.builds(
    lambda client, example, speeds: Costs(client=client, example=example, speeds=speeds),
    st.floats(0.0, 2.0),
    st.floats(1e-4, 1.0),
    speeds,
)


def busy(costs, examples, shares):
    """When each worker is done."""
    seconds = [costs.client + costs.example * count for count in examples]
    return [sum(seconds[k] for k in share) / speed for share, speed in zip(shares, costs.speeds, strict=True)]


@given(costs, sizes)
def test_every_client_is_trained_once_and_equal_input_gives_equal_shares(costs, examples):
    shares = costs.shares(examples)
    assert sorted(place for share in shares for place in share) == list(range(len(examples)))
    assert all(share == sorted(share) for share in shares)
    assert len(shares) == len(costs.speeds)
    assert costs.shares(np.array(examples)) == shares


@given(st.integers(1, 3), st.lists(st.integers(1, 50), min_size=1, max_size=6), st.floats(0.0, 20.0))
def test_equal_workers_end_within_a_third_of_the_best_there_is(workers, examples, client):
    """Graham 1969: at most 4/3 − 1/(3 · workers) of the shortest time."""
    costs = Costs(client=client, example=1.0, speeds=(1.0,) * workers)
    last = max(busy(costs, examples, costs.shares(examples)))
    best = min(
        max(busy(costs, examples, [np.flatnonzero(np.array(given) == worker).tolist() for worker in range(workers)]))
        for given in itertools.product(range(workers), repeat=len(examples))
    )
    assert last <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9


@given(costs, sizes)
def test_no_client_would_be_done_sooner_elsewhere(costs, examples):
    """The last client given to a worker could not have ended sooner with another one."""
    assume(len(costs.speeds) > 1)
    shares = costs.shares(examples)
    ends = busy(costs, examples, shares)
    for worker, share in enumerate(shares):
        if not share:
            continue
        smallest = min(costs.client + costs.example * examples[place] for place in share)
        for other, end in enumerate(ends):
            if other != worker:
                assert ends[worker] <= end + smallest / costs.speeds[other] + 1e-9


def test_a_worker_twice_as_fast_gets_twice_as_much():
    shares = Costs(speeds=(2.0, 1.0)).shares([1] * 30)
    assert [len(share) for share in shares] == [20, 10]


def test_more_workers_than_clients_leave_some_without():
    assert Costs(speeds=(1.0, 1.0, 1.0)).shares([5, 9]) == [[1], [0], []]


def noted(rounds, *, client, example, speeds, noise=0.0, seed=0):
    """Returns an estimate that has seen rounds of a machine with the given costs."""
    rng = np.random.default_rng(seed)
    estimate = CostEstimate(len(speeds))
    estimate.note([Share(clients=1, examples=1, seconds=1e3)] * len(speeds))  # the first round finds its memory
    for _ in range(rounds):
        examples = rng.integers(1, 200, size=40)
        shares = estimate.costs().shares(examples)
        done = []
        for share, speed in zip(shares, speeds, strict=True):
            count = int(examples[share].sum()) if share else 0
            seconds = (client * len(share) + example * count) / speed
            done.append(
                Share(clients=len(share), examples=count, seconds=seconds * (1 + noise * rng.standard_normal()))
            )
        estimate.note(done)
    return estimate.costs()


@pytest.mark.parametrize(("client", "example"), [(0.5, 0.01), (0.0, 0.02), (0.3, 0.0)])
def test_known_costs_are_recovered(client, example):
    found = noted(6, client=client, example=example, speeds=(1.0, 1.0, 1.0))
    assert (found.client, found.example) == pytest.approx((client, example), abs=1e-9)
    assert found.speeds == pytest.approx((1.0, 1.0, 1.0))


def test_known_speeds_are_recovered_also_through_noise():
    found = noted(20, client=0.05, example=0.01, speeds=(1.0, 0.5, 1.5), noise=0.03)
    assert np.array(found.speeds) / sum(found.speeds) == pytest.approx(np.array([1.0, 0.5, 1.5]) / 3, rel=0.1)


@pytest.mark.parametrize(("speeds", "alike"), [((1.0, 1.1, 1.05), True), ((1.0, 1.3, 1.0), False)])
def test_speeds_that_differ_by_little_are_alike(speeds, alike):
    found = noted(6, client=0.05, example=0.01, speeds=speeds)
    assert (found.speeds == (1.0, 1.0, 1.0)) is alike


def test_before_anything_is_known_a_client_costs_its_examples():
    estimate = CostEstimate(2)
    assert estimate.costs() == Costs(client=0.0, example=1.0, speeds=(1.0, 1.0))
    estimate.note([Share(clients=3, examples=30, seconds=9.0), Share(clients=3, examples=30, seconds=1.0)])
    assert estimate.costs() == Costs(client=0.0, example=1.0, speeds=(1.0, 1.0))  # that was the first


@pytest.mark.parametrize(
    "shares",
    [
        [Share(clients=4, examples=40, seconds=2.0), Share(clients=0, examples=0, seconds=0.0)],
        [Share(clients=4, examples=40, seconds=2.0), Share(clients=0, examples=0, seconds=1e-3)],
        [Share(clients=2, examples=20, seconds=0.0), Share(clients=2, examples=20, seconds=0.0)],
        [Share(clients=2, examples=20, seconds=1.0), Share(clients=2, examples=20, seconds=1.0)],
        [Share(clients=9, examples=9, seconds=0.1), Share(clients=1, examples=900, seconds=0.1)],
        [Share(clients=1, examples=1, seconds=1e-9), Share(clients=1, examples=1, seconds=1e9)],
    ],
    ids=["idle", "idle but timed", "no time", "equal", "against each other", "apart"],
)
def test_odd_rounds_leave_usable_costs(shares):
    estimate = CostEstimate(2)
    for _ in range(3):
        estimate.note(shares)
    found = estimate.costs()
    assert found.client >= 0
    assert found.example >= 0
    assert found.client + found.example > 0
    assert all(SLOWEST <= speed < float("inf") for speed in found.speeds)
    assert sorted(itertools.chain(*found.shares([5, 1, 9, 2]))) == [0, 1, 2, 3]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 500), st.floats(0.0, 100.0)), min_size=4, max_size=20))
def test_whatever_the_clock_says_costs_stay_usable(rounds):
    estimate = CostEstimate(2)
    for clients, examples, seconds in rounds:
        share = Share(clients=clients, examples=clients and examples + clients, seconds=seconds)
        estimate.note([share, Share(clients=1, examples=7, seconds=0.1)])
    found = estimate.costs()
    numbers = [found.client, found.example, *found.speeds]
    assert np.isfinite(numbers).all()
    assert min(numbers) >= 0
    assert sorted(itertools.chain(*found.shares([1, 1, 3]))) == [0, 1, 2]
