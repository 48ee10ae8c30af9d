"""What came of a cohort: the running sum of its updates, its clients' metrics, and who failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from shoal import trees
from shoal.algorithms import WeightedSum
from shoal.engine import BlockResult, ClientResult, Result
from shoal.errors import ClientError
from shoal.types import ModelState, StackedUpdate, Update

Outcome = tuple[int, Exception | None]
"""A client, and what stopped it if it failed."""


class CohortSum:
    """Folds an engine's results into one sum; its memory grows by a few numbers for a client, never by a model.

    Args:
        model: The global model that the cohort was sent.
        weigh: Gives an update's share in the mean before normalisation.
    """

    def __init__(self, model: ModelState, weigh: Callable[[Update], float]) -> None:
        self._model = model
        self._weigh = weigh
        self._unread: list[tuple[BlockResult, np.ndarray]] = []
        self.total = WeightedSum(model)
        self.examples: dict[int, float] = {}
        """Number of examples of each client whose update is in the sum."""
        self.metrics: dict[str, dict[int, float]] = {}
        """The clients' own means, by name and client."""
        self.failures: dict[int, Exception] = {}
        """What stopped the others."""

    def add(self, result: Result) -> list[Outcome]:
        """Takes one result.

        Returns:
            What is known of clients now. Of a block that is still being computed, :meth:`settle` tells.
        """
        if isinstance(result, BlockResult):
            updates = result.updates
            weights = np.array([self._weigh(updates.row(index)) for index in range(len(result.clients))])
            self.total.add_stacked(updates, weights)
            # Without its trees, whose memory is the block's.
            told = StackedUpdate(delta={}, weights=updates.weights, metrics=updates.metrics, finite=updates.finite)
            self._unread.append((BlockResult(clients=result.clients, updates=told), weights))
            return []
        error = self._problem(result)
        if error is None and result.update is not None:
            weight = self._weigh(result.update)
            if result.lasting:
                self.total.add_later(result.update, weight, place=result.client)
            else:
                self.total.add(result.update, weight)
            self._report(result.client, result.update.weight, result.update.metrics.items())
        return [self._ended(result.client, error)]

    def settle(self) -> list[Outcome]:
        """Waits for blocks that are still being computed, and returns what became of their clients."""
        outcomes = [outcome for block, weights in self._unread for outcome in self._read(block, weights)]
        self._unread.clear()
        return outcomes

    def _read(self, block: BlockResult, weights: np.ndarray) -> list[Outcome]:
        updates = block.updates
        finite = trees.host(updates.finite)
        self.total.count(int(finite.sum()), float(weights[finite].sum()))
        fine = np.asarray(block.clients)[finite].tolist()
        self.examples.update(zip(fine, updates.weights[finite].tolist(), strict=True))
        for name, column in updates.metrics.items():
            self.metrics.setdefault(name, {}).update(zip(fine, trees.host(column)[finite].tolist(), strict=True))
        problems = [None if good else _not_finite("update") for good in finite.tolist()]
        return [self._ended(client, problem) for client, problem in zip(block.clients, problems, strict=True)]

    def _report(self, client: int, examples: float, metrics: Iterable[tuple[str, float]]) -> None:
        self.examples[client] = examples
        for name, value in metrics:
            self.metrics.setdefault(name, {})[client] = value

    def _ended(self, client: int, error: Exception | None) -> Outcome:
        if error is not None:
            self.failures[client] = error
        return client, error

    def _problem(self, result: ClientResult) -> Exception | None:
        """Says why the sum cannot take a result; None if it can."""
        update = result.update
        if update is None:
            return result.error or ClientError("the engine returned neither an update nor an error")
        expected = (("delta", update.delta, self._model.params), ("buffers", update.buffers, self._model.buffers))
        for part, tree, like in () if result.checked else expected:
            if difference := trees.mismatch(tree, like):
                return ClientError(f"the update's {part} {difference}")
            if not trees.all_finite(tree):
                return _not_finite(f"update's {part}")
        if not (math.isfinite(update.weight) and update.weight > 0):
            return ClientError(f"the update's weight is {update.weight}, and must be a number > 0")
        return None


def _not_finite(what: str) -> ClientError:
    return ClientError(f"the {what} holds NaN or infinity: try a smaller learning rate, or clip_norm")
