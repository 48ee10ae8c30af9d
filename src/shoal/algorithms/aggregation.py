"""The running sum that a round's updates are folded into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal import trees
from shoal.types import Array, ModelState, Params, StackedUpdate, Update


@dataclass(frozen=True, kw_only=True, eq=False)
class Aggregate:
    """The weighted mean of a round's updates."""

    delta: Params
    """Mean change of the trained parameters, float64."""
    buffers: Params
    """Mean change of the buffers, float64."""
    extras: Mapping[str, Params] = field(default_factory=dict)
    """Means of the extra trees."""
    clients: int
    """How many updates are in it."""
    weight: float
    """The sum of their weights."""


class WeightedSum:
    """Σ weight · update over a round, in float64 on the updates' own device; its memory does not grow with the cohort.

    Args:
        model: Gives the names, shapes and device of the sums.
    """

    def __init__(self, model: ModelState) -> None:
        self._delta = trees.zeros(model.params)
        self._buffers = trees.zeros(model.buffers)
        self.extras: dict[str, dict[str, Array]] = {}
        """The sums of the extra trees, by their names."""
        self.clients = 0
        self.weight = 0.0
        self._mean: Aggregate | None = None

    def add(self, update: Update, weight: float) -> None:
        """Adds one update.

        Args:
            update: Its names and shapes are those of the model.
            weight: Its share in the mean before normalisation, > 0.
        """
        trees.add_scaled(self._delta, update.delta, weight)
        trees.add_scaled(self._buffers, update.buffers, weight)
        for name, tree in update.extras.items():
            trees.add_scaled(self.extras.setdefault(name, trees.zeros(tree)), tree, weight)
        self.clients += 1
        self.weight += weight

    def add_stacked(self, updates: StackedUpdate, weights: np.ndarray) -> None:
        """Adds the updates of several clients.

        Args:
            updates: Those that are not finite must be zero.
            weights: Their shares in the mean before normalisation, shape [clients]; not yet in the sum of the weights,
                because which of the updates count may be known only when the device is done: see :meth:`count`.
        """
        trees.add_rows(self._delta, updates.delta, weights)
        trees.add_rows(self._buffers, updates.buffers, weights)

    def count(self, clients: int, weight: float) -> None:
        """Takes updates that :meth:`add_stacked` has added into the number of clients and the sum of the weights."""
        self.clients += clients
        self.weight += weight

    def expect(self, extras: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Makes room for extra trees of which no update has come yet, by the shapes of their arrays."""
        for name, shapes in extras.items():
            if name not in self.extras:
                self.extras[name] = {leaf: self._zeros(shape) for leaf, shape in shapes.items()}

    def arrays(self) -> list[Array]:
        """Returns the sums' own arrays, always in the same order."""
        trees = (self._delta, self._buffers, *(self.extras[name] for name in sorted(self.extras)))
        return [tree[name] for tree in trees for name in sorted(tree)]

    def mean(self) -> Aggregate:
        """Turns the sums, where they are, into the mean of what was added, at least one update; no more is added."""
        if self._mean is None:
            self._mean = Aggregate(
                delta=self._divided(self._delta),
                buffers=self._divided(self._buffers),
                extras={name: self._divided(tree) for name, tree in self.extras.items()},
                clients=self.clients,
                weight=self.weight,
            )
        return self._mean

    def _zeros(self, shape: Sequence[int]) -> Array:
        """Returns float64 zeros of the same kind and on the same device as the sums."""
        like = next(iter(self._delta.values()))
        return np.zeros(shape) if isinstance(like, np.ndarray) else like.new_zeros(shape)

    def _divided(self, tree: dict[str, Array]) -> dict[str, Array]:
        for name in tree:
            tree[name] /= self.weight
        return tree
