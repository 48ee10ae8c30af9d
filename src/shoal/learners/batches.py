"""The order in which a learner sees its examples; the same for every framework and engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np


def batch_indices(
    count: int, *, batch_size: int | None, epochs: int, steps: int | None, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yields the examples' indices batch by batch, shuffled anew in each pass over the data.

    Args:
        count: Number of examples, > 0.
        batch_size: Examples in a batch; the last of a pass is smaller where it does not divide ``count``. None: all.
        epochs: Number of passes; not used where ``steps`` is given.
        steps: Number of batches, over as many passes as they need; None to count epochs instead.
        rng: Draws one permutation at the start of each pass.
    """
    size = batch_size or count
    passes = itertools.count() if steps is not None else range(epochs)
    every = (
        order[start : start + size]
        for order in (rng.permutation(count) for _ in passes)
        for start in range(0, count, size)
    )
    yield from itertools.islice(every, steps)
