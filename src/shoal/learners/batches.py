"""The order in which a learner sees its examples; the same for every framework and engine."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4096)  # clients are many, and their sizes few
def batch_sizes(count: int, *, batch_size: int | None, epochs: int, steps: int | None) -> tuple[int, ...]:
    """Returns how many examples each batch of one call to ``fit`` has.

    Args:
        count: Number of examples, > 0.
        batch_size: Examples in a batch; the last of a pass is smaller where it does not divide ``count``. None: all.
        epochs: Number of passes; not used where ``steps`` is given.
        steps: Number of batches, over as many passes as they need; None to count epochs instead.
    """
    size = min(batch_size or count, count)
    full, rest = divmod(count, size)
    one_pass = (size,) * full + (rest,) * (rest > 0)
    if steps is None:
        return one_pass * epochs
    return (one_pass * -(-steps // len(one_pass)))[:steps]


def draw_seed(rng: np.random.Generator) -> int:
    """Returns a seed for a framework's own generators: for PCG64 ``rng.integers(2**63)``, in a sixth of the time."""
    return int(rng.bit_generator.random_raw()) >> 1


def draw_order(count: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the indices of the examples in the order in which they are seen: one permutation for each pass.

    Args:
        count: Number of examples.
        total: How many are seen altogether; the last pass is cut short where it is no multiple of ``count``.
        rng: Draws the permutations.
    """
    passes = [rng.permutation(count) for _ in range(-(-total // count))]
    return passes[0] if total == count else np.concatenate(passes)[:total]
