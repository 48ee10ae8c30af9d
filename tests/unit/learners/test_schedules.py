from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shoal
from shoal.errors import ConfigurationError
from support import learner, samples

LENGTHS = {"per_epoch": st.integers(1, 30), "epochs": st.integers(1, 20), "warmup_epochs": st.floats(0, 25)}


def factors(schedule, epochs, per_epoch):
    steps = epochs * per_epoch
    return [schedule(step, steps, per_epoch) for step in range(steps)]


@given(**LENGTHS, floor=st.floats(0, 1))
def test_the_rate_rises_from_the_first_step_and_then_falls_to_the_floor(per_epoch, epochs, warmup_epochs, floor):
    found = factors(shoal.WarmupCosine(warmup_epochs=warmup_epochs, floor=floor), epochs, per_epoch)
    warmup = min(round(warmup_epochs * per_epoch), len(found))
    rising, falling = found[:warmup], found[warmup:]
    np.testing.assert_allclose(rising, np.arange(1, warmup + 1) / max(warmup, 1))
    assert all(0 < factor <= 1 for factor in rising)
    assert all(floor - 1e-12 <= factor <= 1 for factor in falling)
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == 1


def test_the_first_step_has_neither_no_rate_nor_the_full_one():
    schedule = shoal.WarmupCosine(warmup_epochs=2)
    assert schedule(0, 100, 10) == 1 / 20
    assert schedule(19, 100, 10) == schedule(20, 100, 10) == 1


def test_half_way_down_is_half_the_rate_and_the_end_is_the_floor():
    schedule = shoal.WarmupCosine(warmup_epochs=1, floor=0.2)
    assert schedule(10 + 45, 100, 10) == pytest.approx(0.6)
    assert schedule(100, 100, 10) == pytest.approx(0.2)  # where step 100 would be, were there one
    assert schedule(99, 100, 10) == pytest.approx(0.2, abs=1e-3)


def test_a_warm_up_longer_than_the_training_never_falls():
    found = factors(shoal.WarmupCosine(warmup_epochs=10), epochs=2, per_epoch=5)
    assert found == [step / 10 for step in range(1, 11)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_epochs": -0.5}, "warmup_epochs must be a number ≥ 0, not -0.5"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs must be a number ≥ 0, not nan"),
        ({"warmup_epochs": float("inf")}, "warmup_epochs must be a number ≥ 0, not inf"),
        ({"floor": 1.5}, r"floor of a schedule must be in \[0, 1\], not 1.5"),
        ({"floor": float("nan")}, "floor of a schedule"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        shoal.WarmupCosine(**settings)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_step_of_a_training_has_its_factor(accumulate):
    rates = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def two_groups(params):
        first, *others = params
        return Noting([{"params": [first], "lr": 0.5}, {"params": others}], lr=0.1)

    schedule = shoal.WarmupCosine(warmup_epochs=1.5, floor=0.1)
    one = learner(optimizer=two_groups, schedule=schedule, accumulate=accumulate)
    shoal.train(one, samples(37), epochs=3)
    per_epoch = -(-37 // (4 * accumulate))
    expected = factors(schedule, 3, per_epoch)
    np.testing.assert_allclose(rates, [[0.5 * factor, 0.1 * factor] for factor in expected], rtol=1e-12)


def test_any_function_of_the_step_may_be_one():
    seen = []

    def schedule(step, steps, steps_per_epoch):
        seen.append((step, steps, steps_per_epoch))
        return 1.0

    shoal.train(learner(schedule=schedule, optimizer=partial(torch.optim.SGD, lr=0.1)), samples(9), epochs=2)
    assert seen == [(step, 6, 3) for step in range(6)]
