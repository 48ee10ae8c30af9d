"""The running sum that a round's updates are folded into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

from shoal import trees
from shoal.types import Array, ModelState, Params, StackedUpdate, Update


@dataclass(frozen=True, kw_only=True, eq=False)
class Aggregate:
    """The weighted mean of a round's updates."""

    delta: Params
    """Mean change of the trained parameters, float64; it may be computed anew each time that an array is asked for."""
    buffers: Params
    """Mean change of the buffers, likewise."""
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
        self._model = model
        self._later: list[tuple[int, Update, float]] = []
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
        self._sum_up(update, weight)
        self.count(1, weight)

    def add_later(self, update: Update, weight: float, *, place: int) -> None:
        """Adds one update that is read when the mean is, piece by piece, so that the sums take next to no memory.

        Args:
            update: Can be read until then, more than once.
            weight: Its share in the mean before normalisation, > 0.
            place: Such updates are added in the order of their places, whichever came first.
        """
        self._later.append((place, update, weight))
        self.count(1, weight)

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
        """Takes updates, such as those that :meth:`add_stacked` has added, into how many there are and their weight."""
        self.clients += clients
        self.weight += weight

    def expect(self, extras: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Makes room for extra trees of which no update has come yet, by the shapes of their arrays."""
        for name, shapes in extras.items():
            if name not in self.extras:
                self.extras[name] = {leaf: self._zeros(shape) for leaf, shape in shapes.items()}

    def arrays(self) -> list[Array]:
        """Returns the sums' own arrays, always in the same order."""
        self._read_later()
        trees = (self._delta, self._buffers, *(self.extras[name] for name in sorted(self.extras)))
        return [tree[name] for tree in trees for name in sorted(tree)]

    def mean(self) -> Aggregate:
        """Turns the sums, where they are, into the mean of what was added, at least one update; no more is added."""
        if self._mean is None:
            means = self._later_mean() or self._sums_mean()
            self._mean = Aggregate(**means, clients=self.clients, weight=self.weight)
        return self._mean

    @cached_property
    def _delta(self) -> dict[str, Array]:
        return trees.zeros(self._model.params)

    @cached_property
    def _buffers(self) -> dict[str, Array]:
        return trees.zeros(self._model.buffers)

    def _sums_mean(self) -> dict[str, Any]:
        self._read_later()
        extras = {name: self._divided(tree) for name, tree in self.extras.items()}
        return {"delta": self._divided(self._delta), "buffers": self._divided(self._buffers), "extras": extras}

    def _later_mean(self) -> dict[str, Any] | None:
        """Returns a mean that is read when it is asked for; None where there are sums already, or extra trees."""
        parts = self._in_order()
        if not parts or len(parts) < self.clients or any(update.extras for update, _ in parts):
            return None
        weights = [weight for _, weight in parts]
        return {
            "delta": _Mean(self._model.params, [update.delta for update, _ in parts], weights),
            "buffers": _Mean(self._model.buffers, [update.buffers for update, _ in parts], weights),
        }

    def _read_later(self) -> None:
        """Takes what was to be read later into the sums."""
        for update, weight in self._in_order():
            self._sum_up(update, weight)
        self._later.clear()

    def _sum_up(self, update: Update, weight: float) -> None:
        trees.add_scaled(self._delta, update.delta, weight)
        trees.add_scaled(self._buffers, update.buffers, weight)
        for name, tree in update.extras.items():
            trees.add_scaled(self.extras.setdefault(name, trees.zeros(tree)), tree, weight)

    def _in_order(self) -> list[tuple[Update, float]]:
        return [(update, weight) for _, update, weight in sorted(self._later, key=itemgetter(0))]

    def _zeros(self, shape: Sequence[int]) -> Array:
        """Returns float64 zeros of the same kind and on the same device as the sums."""
        like = next(iter(self._delta.values()))
        return np.zeros(shape) if isinstance(like, np.ndarray) else like.new_zeros(shape)

    def _divided(self, tree: dict[str, Array]) -> dict[str, Array]:
        for name in tree:
            tree[name] /= self.weight
        return tree


class _Mean(trees.Computed):
    """The weighted mean of trees, computed in float64 as its arrays are asked for.

    Args:
        like: Gives the names, shapes and device.
        parts: One tree for each update.
        weights: Their shares before normalisation.
    """

    def __init__(self, like: Params, parts: Sequence[Params], weights: Sequence[float]) -> None:
        super().__init__(like)
        self._parts = parts
        self._weights = weights

    def pieces(self, name: str, size: int) -> Iterator[Array]:
        """Computes the mean of an array."""
        terms = [trees.pieces(tree, name, size) for tree in self._parts]
        memory: Array | None = None  # one for all pieces: to get it anew for each takes a quarter longer
        for piece in trees.in_pieces(self.like[name], size):
            memory = trees.zeros({name: piece})[name] if memory is None else memory
            sums = memory[: len(piece)]
            sums[...] = 0
            for term, weight in zip(terms, self._weights, strict=True):
                trees.add_scaled({name: sums}, {name: next(term)}, weight)
            sums /= sum(self._weights)
            yield sums
