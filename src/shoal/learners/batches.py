"""The order in which a learner sees its examples; the same for every framework and engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def batch_sizes(count: int, *, batch_size: int | None, epochs: int, steps: int | None) -> list[int]:
    """Returns how many examples each batch of one call to ``fit`` has.

    Args:
        count: Number of examples, > 0.
        batch_size: Examples in a batch; the last of a pass is smaller where it does not divide ``count``. None: all.
        epochs: Number of passes; not used where ``steps`` is given.
        steps: Number of batches, over as many passes as they need; None to count epochs instead.
    """
    size = min(batch_size or count, count)
    full, rest = divmod(count, size)
    one_pass = [size] * full + [rest] * (rest > 0)
    if steps is None:
        return one_pass * epochs
    return (one_pass * -(-steps // len(one_pass)))[:steps]


def draw_order(count: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the indices of the examples in the order in which they are seen: one permutation for each pass.

    Args:
        count: Number of examples.
        total: How many are seen altogether; the last pass is cut short where it is no multiple of ``count``.
        rng: Draws the permutations.
    """
    passes = [rng.permutation(count) for _ in range(-(-total // count))]
    return passes[0] if total == count else np.concatenate(passes)[:total]


def batch_indices(
    count: int, *, batch_size: int | None, epochs: int, steps: int | None, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yields the examples' indices batch by batch, shuffled anew in each pass over the data.

    Args:
        count: Number of examples, > 0.
        batch_size: As in :func:`batch_sizes`, like the next two.
        epochs: Number of passes.
        steps: Number of batches in place of passes.
        rng: Draws one permutation for each pass.
    """
    sizes = batch_sizes(count, batch_size=batch_size, epochs=epochs, steps=steps)
    order = draw_order(count, sum(sizes), rng)
    start = 0
    for size in sizes:
        yield order[start : start + size]
        start += size
