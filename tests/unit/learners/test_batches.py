from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from support import batch_indices

COUNTS = st.integers(1, 40)
SIZES = st.none() | st.integers(1, 50)


@given(COUNTS, SIZES, st.integers(1, 4), st.integers(0, 100))
def test_every_pass_sees_every_example_once(count, batch_size, epochs, seed):
    rng = np.random.default_rng(seed)
    batches = list(batch_indices(count, batch_size=batch_size, epochs=epochs, steps=None, rng=rng))
    size = batch_size or count
    per_pass = -(-count // size)
    assert len(batches) == epochs * per_pass
    for chunk in zip(*[iter(batches)] * per_pass, strict=True):
        assert sorted(np.concatenate(chunk).tolist()) == list(range(count))
        assert all(len(batch) == size for batch in chunk[:-1])


@given(COUNTS, SIZES, st.integers(1, 30), st.integers(0, 100))
def test_steps_are_the_beginning_of_as_many_passes(count, batch_size, steps, seed):
    def batches(**settings):
        return list(batch_indices(count, batch_size=batch_size, rng=np.random.default_rng(seed), **settings))

    counted = batches(epochs=1, steps=steps)
    passes = batches(epochs=steps, steps=None)
    assert len(counted) == steps
    assert all(np.array_equal(one, other) for one, other in zip(counted, passes, strict=False))
