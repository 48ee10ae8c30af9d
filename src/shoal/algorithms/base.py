"""What every federated method is: two pure functions on the server's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from shoal.algorithms.aggregation import Aggregate
from shoal.types import Broadcast, ModelState, Params, Update


@dataclass(frozen=True, kw_only=True, eq=False)
class ServerState:
    """Everything that a method carries from round to round."""

    round: int
    """Number of rounds done."""
    model: ModelState
    """The global model after them."""
    slots: Mapping[str, Params] = field(default_factory=dict)
    """The method's own trees, such as a momentum, by name; float64, with the names of the trained parameters."""


@runtime_checkable
class Algorithm(Protocol):
    """A federated method. It knows no framework and no engine, and keeps nothing outside :class:`ServerState`."""

    def start(self, model: ModelState) -> ServerState:
        """Returns the state before the first round."""
        ...  # pragma: no cover

    def broadcast(self, state: ServerState) -> Broadcast:
        """Returns what the cohort of the next round is sent."""
        ...  # pragma: no cover

    def weight(self, update: Update) -> float:
        """Returns an update's share in the mean before normalisation, > 0."""
        ...  # pragma: no cover

    def step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Returns the state after a round; it may take the aggregate's arrays over, which nobody needs afterwards."""
        ...  # pragma: no cover

    def describe(self) -> dict[str, Any]:
        """Returns the method's name and settings, as JSON."""
        ...  # pragma: no cover
