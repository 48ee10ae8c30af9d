"""Which clients train in one block, and how large a block is fastest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LADDER = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))
"""The block sizes that are tried: 1, 2, 5, 10, 20, 50, …"""

SPREAD = 0.8
"""In a block no client has less than this share of the largest one's work: what is missing is padding, or idles."""

TRIES = 3
"""How often a size is measured; the first time does not count, because memory is found and kernels are chosen."""

GAIN = 0.97
"""What the next size must take of the time of the best so far, to be better and not just luckier."""


def by_work(work: Sequence[int]) -> list[int]:
    """Returns the clients' indices, those with the most work first, so that neighbours fit into one block."""
    order: list[int] = np.argsort(-np.asarray(work), kind="stable").tolist()
    return order


def next_block(order: Sequence[int], work: Sequence[int], start: int, size: int) -> list[int]:
    """Returns the clients of the block that begins at a place of the order.

    Args:
        order: The clients' indices, from :func:`by_work`.
        work: How many samples each client sees.
        start: The place.
        size: The most clients in a block.
    """
    least = SPREAD * work[order[start]]
    block = []
    for index in order[start : start + size]:
        if work[index] < least:
            break
        block.append(index)
    return block


class BlockSearch:
    """Finds the block size and the variant that take the least time for a sample.

    From its first size it goes up while that is faster, else down; at the best size it tries the variants. What is
    measured are the blocks of the first rounds themselves: no work is done twice.

    Args:
        first: The size to start from.
        largest: The largest size worth trying: that of the cohort.
        variants: The ways in which a block can be run, the usual one first.
        fixed: Whether the first size is the user's, and only the variants are to be tried.
    """

    def __init__(self, first: int, largest: int, variants: Sequence[str], *, fixed: bool = False) -> None:
        self._variants = list(variants)
        self._times: dict[tuple[int, str], list[float]] = {}
        self._sizes = [first] if fixed else sorted({*(size for size in LADDER if size < largest), largest})
        self._first = min(self._sizes, key=lambda size: (abs(size - first), size))
        self.choice: tuple[int, str] | None = None
        """The size and variant that were found; None while the search is on."""
        self._decide()

    @property
    def current(self) -> tuple[int, str]:
        """The size and variant to use now."""
        return self.choice or self._trying

    def record(self, seconds: float) -> None:
        """Takes the time that a block of the current size and variant took for a sample."""
        if self.choice is None:
            self._times.setdefault(self._trying, []).append(seconds)
            self._decide()

    def refuse(self, size: int) -> None:
        """Takes note that a block of so many clients did not fit the device: none so large is tried again."""
        smaller = max(size // 2, 1)
        self._sizes = sorted({*(known for known in self._sizes if known < smaller), smaller})
        self._first = min(self._first, smaller)
        if self.choice is not None:
            self.choice = (min(self.choice[0], smaller), self.choice[1])
        else:
            self._decide()

    def leave(self, variant: str) -> None:
        """Takes note that a variant cannot be run after all; the usual one always can."""
        self._variants.remove(variant)
        if self.choice is None:
            self._decide()
        elif self.choice[1] == variant:
            self.choice = (self.choice[0], self._variants[0])

    def _decide(self) -> None:
        """Sets what to try next, or the choice if nothing is left to try."""
        trying = self._untried()
        if trying is not None:
            self._trying = trying
            return
        measured = [
            (size, variant)
            for size, variant in self._times
            if size in self._sizes and variant in self._variants and self._cost((size, variant)) is not None
        ]
        only = (self._sizes[0], self._variants[0])
        self.choice = min(measured, key=lambda key: self._cost(key) or 0.0, default=only)

    def _untried(self) -> tuple[int, str] | None:
        if len(self._sizes) == len(self._variants) == 1:
            return None  # there is nothing to choose
        usual = self._variants[0]
        best = self._sizes.index(self._first)
        for direction in (1, -1):
            while True:
                here, there = (self._sizes[best], usual), best + direction
                if self._cost(here) is None:
                    return here
                if not 0 <= there < len(self._sizes):
                    break
                cost = self._cost((self._sizes[there], usual))
                if cost is None:
                    return self._sizes[there], usual
                if cost >= GAIN * (self._cost(here) or 0.0):
                    break
                best = there
            if self._sizes[best] != self._first:
                break  # it went up: no need to look below
        size = self._sizes[best]
        return next(((size, variant) for variant in self._variants if self._cost((size, variant)) is None), None)

    def _cost(self, key: tuple[int, str]) -> float | None:
        times = self._times.get(key, [])
        return min(times[1:]) if len(times) >= TRIES else None
