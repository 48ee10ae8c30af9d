"""Which worker trains which clients: longest first, by what clients were measured to cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REMEMBERED = 20
"""From how many of the last rounds costs are estimated."""

SLOWEST = 0.2
"""No worker counts as slower than this share of the mean, so that a single bad round does not idle it."""

ALIKE = 1.15
"""Workers whose speeds differ by a smaller factor count as equally fast: so much differs by chance from run to run, and
unequal shares of equal clients fill their blocks unequally."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What clients cost, in seconds: ``(client + example · examples) / speed of the worker``."""

    client: float = 0.0
    """For each client."""
    example: float = 1.0
    """For each of its examples."""
    speeds: tuple[float, ...]
    """How fast each worker is; 1 is usual."""

    def shares(self, examples: Sequence[int]) -> list[list[int]]:
        """Divides a cohort among the workers so that all end at about the same time.

        The costliest client goes to the worker that would be done with it first, and so on (LPT: Graham 1969, "Bounds
        on Multiprocessing Timing Anomalies"). Among equals the order decides, so that equal costs give equal shares.

        Args:
            examples: How many each client of the cohort has.

        Returns:
            For each worker the clients' places in the cohort, ascending.
        """
        costs = self.client + self.example * np.asarray(examples, dtype=float)
        shares: list[list[int]] = [[] for _ in self.speeds]
        busy = [0.0] * len(self.speeds)
        for place in np.argsort(-costs, kind="stable").tolist():
            done = [until + costs[place] / speed for until, speed in zip(busy, self.speeds, strict=True)]
            worker = done.index(min(done))
            busy[worker] = done[worker]
            shares[worker].append(place)
        return [sorted(share) for share in shares]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one worker did in one round."""

    clients: int
    """How many it trained."""
    examples: int
    """How many they have together."""
    seconds: float
    """How long it took."""


class CostEstimate:
    """Estimates costs from the time that shares took, by least squares.

    Args:
        workers: How many there are.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._rounds: deque[Sequence[Share]] = deque(maxlen=REMEMBERED)
        self._warm = False

    def note(self, shares: Sequence[Share]) -> None:
        """Takes what each worker did in a round; the first does not count, because memory is found in it."""
        if self._warm:
            self._rounds.append(shares)
        self._warm = True

    def costs(self) -> Costs:
        """Returns what clients cost, as far as it is known: before it is, as much as they have examples."""
        equal = (1.0,) * self._workers
        if not self._rounds:
            return Costs(speeds=equal)
        # Axes: round, worker, quantity.
        sizes = np.array([[(share.clients, share.examples) for share in shares] for shares in self._rounds], float)
        seconds = np.array([[share.seconds for share in shares] for shares in self._rounds])
        client, example = _positive_fit(sizes.reshape(-1, 2), seconds.reshape(-1))
        expected = (sizes @ (client, example)).sum(axis=0)
        speeds = np.where(seconds.sum(axis=0) > 0, expected / np.maximum(seconds.sum(axis=0), 1e-9), 1.0)
        # Not positive: some worker has had nothing to do yet.
        if not (speeds > 0).all() or speeds.max() < ALIKE * speeds.min():
            return Costs(client=client, example=example, speeds=equal)
        return Costs(client=client, example=example, speeds=tuple(np.maximum(speeds, SLOWEST).tolist()))


def _positive_fit(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Returns the coefficients ≥ 0 of clients and examples that explain the seconds best; not both are 0."""
    both = np.linalg.lstsq(sizes, seconds, rcond=None)[0]
    if (both >= 0).all() and both.any():
        return float(both[0]), float(both[1])
    each = (sizes * seconds[:, None]).sum(axis=0) / np.maximum((sizes**2).sum(axis=0), 1.0)
    if both[0] < 0 and each[1] > 0:
        return 0.0, float(each[1])
    return (float(each[0]), 0.0) if each[0] > 0 else (0.0, 1.0)
