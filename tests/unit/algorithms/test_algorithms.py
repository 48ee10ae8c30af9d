from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal import trees
from shoal.algorithms import ALGORITHMS, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, WeightedSum
from shoal.errors import ConfigurationError
from shoal.types import ModelState, Update
from support import assert_equal

START = {"w": np.array([1.0, -2.0, 0.5]), "b": np.array(0.25)}


def update(delta, weight=1.0, **more):
    return Update(delta={"w": np.asarray(delta, float), "b": np.asarray(np.sum(delta))}, weight=weight, **more)


def steps(method, deltas, start=START):
    """Returns the parameters after one round for each delta, each the update of a single client."""
    state = method.start(ModelState(params=start))
    for delta in deltas:
        total = WeightedSum(state.model)
        total.add(update(delta), method.weight(update(delta)))
        state = method.step(state, total.mean())
    return state


DELTAS = [[0.1, -0.2, 0.0], [0.05, 0.3, -0.4], [-0.2, 0.0, 1.0]]


def by_hand(rule, server_lr, beta1, tau):
    """Algorithm 2 of Reddi et al. for one array, written down again as plainly as it is printed there."""
    x, m, v = START["w"].copy(), np.zeros(3), np.full(3, tau**2)
    for delta in map(np.array, DELTAS):
        m = beta1 * m + (1 - beta1) * delta
        v = rule(v, delta)
        x = x + server_lr * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        (FedAdagrad(server_lr=0.3, tau=0.01), lambda v, d: v + d * d),
        (FedAdam(server_lr=0.3, beta1=0.8, beta2=0.7, tau=0.01), lambda v, d: 0.7 * v + 0.3 * d * d),
        (
            FedYogi(server_lr=0.3, beta1=0.8, beta2=0.7, tau=0.01),
            lambda v, d: v - 0.3 * d * d * np.sign(v - d * d),
        ),
    ],
)
def test_adaptive_methods_are_algorithm_2(method, rule):
    expected = by_hand(rule, 0.3, method.beta1, 0.01)
    np.testing.assert_allclose(steps(method, DELTAS).model.params["w"], expected, rtol=1e-12)


def test_fedavgm_accumulates_a_velocity():
    x, velocity = START["w"].copy(), np.zeros(3)
    for delta in map(np.array, DELTAS):
        velocity = 0.6 * velocity + delta
        x = x + 0.5 * velocity
    np.testing.assert_allclose(steps(FedAvgM(momentum=0.6, server_lr=0.5), DELTAS).model.params["w"], x, rtol=1e-12)


@pytest.mark.parametrize("same", [FedAvgM(momentum=0.0), FedProx(mu=0.0)])
def test_a_knob_at_zero_is_fedavg_exactly(same):
    assert_equal(dict(steps(same, DELTAS).model.params), dict(steps(FedAvg(), DELTAS).model.params))
    assert same.objective().proximal == 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_torch_and_numpy_agree_and_keep_their_dtypes(name):
    method = ALGORITHMS[name]()
    arrays = {key: value.astype(np.float32) for key, value in START.items()}
    tensors = {key: torch.as_tensor(value) for key, value in arrays.items()}
    state = method.start(ModelState(params=tensors))
    for delta in DELTAS:
        total = WeightedSum(state.model)
        plain = update(delta)
        total.add(dataclasses.replace(plain, delta={k: torch.as_tensor(v) for k, v in plain.delta.items()}), 2.0)
        state = method.step(state, total.mean())
    expected = steps(method, DELTAS, arrays)
    assert_equal(dict(state.model.params), dict(expected.model.params), atol=1e-7)
    assert {p.dtype for p in state.model.params.values()} == {torch.float32}
    assert {p.dtype for p in expected.model.params.values()} == {np.dtype(np.float32)}
    assert state.round == 3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_buffers_are_averaged_and_never_optimized(name):
    method = ALGORITHMS[name]()
    model = ModelState(params=START, buffers={"mean": np.array([0.0, 4.0])}, constants={"count": np.array(3)})
    total = WeightedSum(model)
    for change, weight in (([1.0, 0.0], 1.0), ([4.0, -4.0], 2.0)):
        sent = dataclasses.replace(update([0.1, 0.1, 0.1], weight), buffers={"mean": np.array(change)})
        total.add(sent, method.weight(sent))
    after = method.step(method.start(model), total.mean()).model
    np.testing.assert_allclose(after.buffers["mean"], [3.0, 4.0 - 8 / 3])
    assert after.constants["count"] == 3


@given(st.lists(st.tuples(st.integers(1, 10_000), st.integers(-8, 8)), min_size=1, max_size=8))
def test_weighting(clients):
    for weighting, weights in (("examples", [n for n, _ in clients]), ("uniform", [1] * len(clients))):
        method = FedAvg(weighting=weighting)
        total = WeightedSum(ModelState(params=START))
        for n, value in clients:
            sent = update([value / 3, 0, 1], weight=float(n))
            total.add(sent, method.weight(sent))
        mean = total.mean()
        expected = np.average([value / 3 for _, value in clients], weights=weights)
        assert mean.delta["w"][0] == pytest.approx(expected, abs=1e-12)
        assert mean.delta["w"][2] == pytest.approx(1.0)
        assert mean.clients == len(clients)


@given(st.permutations([(0, 0.1, 3.0), (1, 0.7, 2.0), (2, -1 / 3, 1.0), (3, 1e-9, 7.0)]), st.booleans())
def test_updates_that_are_read_later_are_added_in_the_order_of_their_places(arrivals, summed):
    model = ModelState(params=START, buffers={"mean": np.array([0.0, 4.0])})
    now, later = WeightedSum(model), WeightedSum(model)
    sent = {place: dataclasses.replace(update([v, v / 3, v * 7], w), buffers={"mean": np.full(2, v)})
            for place, v, w in arrivals}  # fmt: skip
    for _, one in sorted(sent.items()):
        now.add(one, one.weight)
    for place, _, weight in arrivals:
        later.add_later(sent[place], weight, place=place)
    if summed:
        for ours, theirs in zip(later.arrays(), now.arrays(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    for _ in range(2):  # it may be asked for again
        for part in ("delta", "buffers"):
            assert_equal(dict(getattr(later.mean(), part)), dict(getattr(now.mean(), part)))
    assert (later.mean().clients, later.mean().weight) == (now.mean().clients, now.mean().weight)
    assert_equal(*(dict(FedAvg().step(FedAvg().start(model), one.mean()).model.merged()) for one in (later, now)))


def test_extra_trees_that_are_read_later_are_averaged_too():
    total = WeightedSum(ModelState(params=START))
    for place, value, weight in ((1, 1.0, 1.0), (0, 5.0, 3.0)):
        sent = update([value, 0, 0], weight, extras={"control": {"c": np.array([value])}})
        total.add_later(sent, weight, place=place)
    assert total.mean().extras["control"]["c"].tolist() == [4.0]
    assert total.mean().delta["w"].tolist() == [4.0, 0.0, 0.0]


def test_extra_trees_are_averaged_by_name():
    total = WeightedSum(ModelState(params=START))
    for value, weight in ((1.0, 1.0), (5.0, 3.0)):
        total.add(update([0, 0, 0], weight, extras={"control": {"c": np.array([value])}}), weight)
    assert total.mean().extras["control"]["c"].tolist() == [4.0]


def test_sums_of_low_precision_updates_do_not_lose_small_ones():
    model = ModelState(params={"w": torch.zeros(1, dtype=torch.bfloat16)})
    total = WeightedSum(model)
    for _ in range(1000):
        total.add(Update(delta={"w": torch.full((1,), 1.0, dtype=torch.bfloat16)}, weight=1.0), 1.0)
    assert total.mean().delta["w"].item() == 1.0  # a running sum in bfloat16 would stop at 256


def test_the_broadcast_holds_the_round_the_model_and_the_objective():
    state = FedProx(mu=0.3).start(ModelState(params=START))
    broadcast = FedProx(mu=0.3).broadcast(state)
    assert broadcast.round == 1
    assert broadcast.model is state.model
    assert broadcast.objective.proximal == 0.3


def test_a_step_leaves_the_state_before_it_alone():
    method = FedAdam()
    state = method.start(ModelState(params=START))
    before = trees.copy(state.model.params), trees.copy(state.slots["v"])
    total = WeightedSum(state.model)
    total.add(update(DELTAS[0]), 1.0)
    method.step(state, total.mean())
    assert_equal(before[0], dict(state.model.params))
    assert_equal(before[1], dict(state.slots["v"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAvg(weighting="sizes"), "unknown weighting 'sizes'"),
        (lambda: FedAvg(server_lr=0.0), "FedAvg: server_lr must be > 0, not 0.0"),
        (lambda: FedAvg(server_lr=float("nan")), "server_lr must be > 0"),
        (lambda: FedProx(mu=-0.1), r"FedProx: mu must be ≥ 0, not -0.1"),
        (lambda: FedProx(mu=float("inf")), "mu must be"),
        (lambda: FedAvgM(momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: FedAdam(beta1=1.0), "beta1 must be in"),
        (lambda: FedAdam(beta2=-0.1), "beta2 must be in"),
        (lambda: FedYogi(beta2=1.5), "beta2 must be in"),
        (lambda: FedAdagrad(tau=0.0), "tau must be > 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_descriptions_hold_the_name_and_every_setting():
    assert FedProx(mu=0.2).describe() == {"name": "FedProx", "weighting": "examples", "server_lr": 1.0, "mu": 0.2}
