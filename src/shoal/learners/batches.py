"""The order in which a learner sees its examples; the same for every framework and engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shoal.errors import DataError


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


@dataclass(frozen=True)
class Piece:
    """The part of a step's batch that one rank computes at a time."""

    start: int
    """Where it begins in the step's batch."""
    count: int
    """How many examples it has; 0 where a rank has nothing to do but must compute with the others."""
    share: float
    """Its share in the step's gradient: its examples by those of the whole step."""

    @property
    def computed(self) -> int:
        """How many examples the rank computes: where it has nothing to do one, of which nothing counts."""
        return max(self.count, 1)


@lru_cache(maxsize=256)  # the steps of an epoch have two sizes at most
def pieces(examples: int, *, batch_size: int, ranks: int, rank: int) -> tuple[Piece, ...]:
    """Returns what one rank computes of a step's batch, in equally many pieces on each rank.

    The ranks' parts follow each other in the batch and differ by one example at most, as a rank's pieces do; so the
    sum of ``share`` times the mean over the piece, over all pieces and ranks, is the mean over the batch.

    Args:
        examples: How many the whole batch has.
        batch_size: The most that a piece may have.
        ranks: How many ranks there are.
        rank: Which one to answer for.
    """
    start, length = _part(examples, ranks, rank)
    number = max(-(-_part(examples, ranks, 0)[1] // batch_size), 1)
    parts = (_part(length, number, index) for index in range(number))
    return tuple(Piece(start=start + first, count=count, share=count / examples) for first, count in parts)


def part_of_rank(
    order: np.ndarray, sizes: Sequence[int], *, batch_size: int | None, ranks: int, rank: int
) -> tuple[list[tuple[Piece, ...]], np.ndarray]:
    """Returns what one rank computes of several steps: each step's pieces, and the indices of their examples in turn.

    Args:
        order: The indices of the examples in the order in which they are seen, step by step.
        sizes: How many each step has.
        batch_size: The most that a piece may have; None for no limit.
        ranks: How many ranks there are.
        rank: Which one to answer for.
    """
    steps = [pieces(size, batch_size=batch_size or size, ranks=ranks, rank=rank) for size in sizes]
    if ranks == 1:
        return steps, order
    picked, begin = [], 0
    for size, step in zip(sizes, steps, strict=True):
        for piece in step:
            start = begin + (piece.start if piece.count else 0)
            picked.append(order[start : start + piece.computed])
        begin += size
    return steps, np.concatenate(picked)


def check_divisible(examples: int, devices: int) -> None:
    """Makes sure that each device has an example.

    Raises:
        DataError: There are fewer.
    """
    if examples < devices:
        raise DataError(f"{examples} examples cannot be divided among {devices} devices: use fewer")


def _part(count: int, parts: int, index: int) -> tuple[int, int]:
    """Returns where one of several nearly equal parts begins, and how long it is; the first ones are the longer."""
    base, rest = divmod(count, parts)
    return index * base + min(index, rest), base + (index < rest)
