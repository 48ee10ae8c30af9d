"""However a cohort is split over workers, their sums added up are the sum of one worker."""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engines import ClientResult, CohortSum, merging
from shoal.errors import ClientError
from shoal.types import ModelState, Update
from support import assert_equal

SHAPES = {"weight": (3, 2), "bias": (2,)}
EXTRAS = {"control": {"weight": (3, 2), "scale": ()}, "second": {"moments": (4,)}}


def array(rng, shape, kind):
    made = rng.normal(size=shape)
    return np.asarray(made) if kind == "numpy" else torch.as_tensor(np.asarray(made))


def result(client, kind):
    """Each client's own: some fail, some lack a metric or an extra tree, one has a metric that is NaN."""
    rng = np.random.default_rng(client)
    if client % 5 == 3:
        return ClientResult(client=client, error=ZeroDivisionError(f"client {client}"))
    metrics = {"loss": float(rng.normal()), "accuracy": 0.0 if client % 3 else float(rng.uniform())}
    if client % 4 == 1:
        metrics = {"loss": float("nan"), "rare": float("inf")}
    update = Update(
        delta={name: array(rng, shape, kind) for name, shape in SHAPES.items()},
        buffers={"mean": array(rng, (2,), kind)},
        weight=float(1 + client % 7),
        metrics=metrics,
        extras={
            name: {leaf: array(rng, shape, kind) for leaf, shape in tree.items()}
            for index, (name, tree) in enumerate(EXTRAS.items())
            if client % 3 == index
        },
    )
    return ClientResult(client=client, update=update)


def summed(clients, kind):
    rng = np.random.default_rng(0)
    model = ModelState(
        params={name: array(rng, shape, kind) for name, shape in SHAPES.items()},
        buffers={"mean": array(rng, (2,), kind)},
    )
    cohort = CohortSum(model, lambda update: update.weight**0.5)
    for client in clients:
        cohort.add(result(client, kind))
    cohort.settle()
    return cohort


class Meeting:
    """Adds up in memory what so many threads bring."""

    def __init__(self, workers):
        self._barrier = threading.Barrier(workers, timeout=10)
        self._brought = {}

    def add_up(self, rank):
        def add(arrays, numbers):
            self._brought[rank] = [copy.deepcopy(arrays), list(numbers)]
            self._barrier.wait()
            every = [self._brought[other] for other in sorted(self._brought)]
            for index, own in enumerate(arrays):
                total = sum(one[0][index] for one in every[1:]) + every[0][0][index]
                own[...] = total
            return np.sum([one[1] for one in every], axis=0).tolist()

        return add


def merged(shares, cohort, kind):
    """Returns each worker's sum after merging, and what it learned of the others' clients."""
    sums = [summed(share, kind) for share in shares]
    together = json.loads(json.dumps(merging.merged([merging.summary(one) for one in sums])))
    meeting, learned = Meeting(len(shares)), [None] * len(shares)

    def merge(rank):
        learned[rank] = merging.merge(sums[rank], together, cohort, meeting.add_up(rank))

    threads = [threading.Thread(target=merge, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return sums, learned


def assert_same_sum(one, expected):
    assert one.total.clients == expected.total.clients
    assert one.total.weight == pytest.approx(expected.total.weight)
    assert one.examples == expected.examples
    assert one.metrics.keys() == expected.metrics.keys()
    for name, column in expected.metrics.items():
        assert one.metrics[name] == pytest.approx(column, nan_ok=True, rel=0, abs=0)
    assert one.failures.keys() == expected.failures.keys()
    assert one.total.extras.keys() == expected.total.extras.keys()
    if expected.total.clients:
        ours, theirs = one.total.mean(), expected.total.mean()
        assert_equal(ours.delta, theirs.delta, atol=1e-12)
        assert_equal(ours.buffers, theirs.buffers, atol=1e-12)
        for name in theirs.extras:
            assert_equal(ours.extras[name], theirs.extras[name], atol=1e-12)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 40), max_size=12, unique=True).flatmap(
        lambda cohort: st.tuples(
            st.just(cohort), st.lists(st.integers(0, 3), min_size=len(cohort), max_size=len(cohort))
        )
    ),
    st.integers(1, 4),
    st.sampled_from(["numpy", "torch"]),
)
def test_any_split_has_the_sum_of_one_worker(split, workers, kind):
    cohort, owners = split
    shares = [
        [client for client, owner in zip(cohort, owners, strict=True) if owner % workers == rank]
        for rank in range(workers)
    ]
    expected = summed(cohort, kind)
    sums, learned = merged(shares, cohort, kind)
    for share, one, outcomes in zip(shares, sums, learned, strict=True):
        assert_same_sum(one, expected)
        assert [client for client, _ in outcomes] == [client for client in cohort if client not in share]
        assert {client for client, error in outcomes if error} == set(expected.failures) - set(share)
    for one in sums[1:]:  # the server's step is the same everywhere only if its input is, bit for bit
        assert one.total.weight == sums[0].total.weight
        for array, other in zip(one.total.arrays(), sums[0].total.arrays(), strict=True):
            assert (np.asarray(array) == np.asarray(other)).all()
    if len(cohort) and workers == 1:
        assert sums[0].total.weight == expected.total.weight


def test_another_workers_failure_has_its_message_and_its_traceback():
    (first, _), (learned, _) = merged([[0], [3]], [0, 3], "torch")
    (client, error), *rest = learned
    assert (client, str(error), rest) == (3, "ZeroDivisionError: client 3", [])
    assert isinstance(error, ClientError)
    assert "ZeroDivisionError: client 3" in error.__notes__[0]
    assert first.failures[3] is error


def test_a_worker_keeps_its_own_exception():
    (_, second), _ = merged([[0], [3]], [0, 3], "torch")
    assert isinstance(second.failures[3], ZeroDivisionError)


def test_what_is_told_beside_the_numbers_does_not_grow_with_the_cohort():
    short, long = (json.dumps(merging.summary(summed(clients, "torch"))) for clients in ([0, 12], [0, 12, 24, 36]))
    assert len(short) == len(long)
