from __future__ import annotations

import math
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.learners.batches import part_of_rank, pieces
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


@given(examples=st.integers(1, 60), batch_size=st.integers(1, 20), ranks=st.integers(1, 7))
def test_the_ranks_divide_a_batch_among_them_in_order(examples, batch_size, ranks):
    of_ranks = [pieces(examples, batch_size=batch_size, ranks=ranks, rank=rank) for rank in range(ranks)]
    whole = list(chain.from_iterable(of_ranks))
    ends = [0]
    for piece in whole:
        assert piece.start == ends[-1]
        ends.append(piece.start + piece.count)
    assert ends[-1] == examples
    assert len({len(own) for own in of_ranks}) == 1  # else some rank would wait for gradients that never come
    assert all(0 <= piece.count <= batch_size for piece in whole)
    assert math.isclose(sum(piece.share for piece in whole), 1)
    assert all(piece.share == piece.count / examples for piece in whole)
    loads = [sum(piece.count for piece in own) for own in of_ranks]
    assert max(loads) - min(loads) <= 1
    for own in of_ranks:
        counts = [piece.count for piece in own]
        assert max(counts) - min(counts) <= 1


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    batch_size=st.none() | st.integers(1, 9),
    ranks=st.integers(1, 5),
)
def test_the_ranks_have_every_step_among_them(sizes, batch_size, ranks):
    order = np.random.default_rng(0).permutation(sum(sizes))
    begins = np.cumsum([0, *sizes[:-1]])
    seen = [[] for _ in sizes]
    for rank in range(ranks):
        steps, own = part_of_rank(order, sizes, batch_size=batch_size, ranks=ranks, rank=rank)
        assert steps == [pieces(size, batch_size=batch_size or size, ranks=ranks, rank=rank) for size in sizes]
        counts = [piece.computed for step in steps for piece in step]
        assert len(own) == sum(counts)
        parts = iter(np.split(own, np.cumsum(counts)[:-1]))
        for number, step in enumerate(steps):
            for piece in step:
                part = next(parts)
                assert set(part) <= set(order[begins[number] : begins[number] + sizes[number]])
                seen[number] += part[: piece.count].tolist()
    for number, size in enumerate(sizes):
        assert seen[number] == order[begins[number] : begins[number] + size].tolist()


@given(batch_size=st.integers(1, 9), accumulate=st.integers(1, 5), ranks=st.integers(1, 5))
def test_a_full_step_is_as_many_full_batches_as_were_asked_for(batch_size, accumulate, ranks):
    full = batch_size * accumulate * ranks
    for rank in range(ranks):
        own = pieces(full, batch_size=batch_size, ranks=ranks, rank=rank)
        assert [piece.count for piece in own] == [batch_size] * accumulate


@given(
    examples=st.integers(1, 60), batch_size=st.integers(1, 20), ranks=st.integers(1, 7), seed=st.integers(0, 2**32 - 1)
)
def test_the_pieces_means_make_the_mean_of_the_batch(examples, batch_size, ranks, seed):
    values = np.random.default_rng(seed).normal(size=examples)
    total = 0.0
    for rank in range(ranks):
        for piece in pieces(examples, batch_size=batch_size, ranks=ranks, rank=rank):
            if piece.count:
                total += piece.share * values[piece.start : piece.start + piece.count].mean()
    assert math.isclose(total, values.mean(), abs_tol=1e-12)
