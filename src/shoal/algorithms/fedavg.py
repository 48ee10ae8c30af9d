"""Federated averaging, and the frame of the methods that differ from it in the server's optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shoal import trees
from shoal.algorithms.aggregation import Aggregate
from shoal.algorithms.base import ServerState
from shoal.description import dataclass_fields
from shoal.errors import ConfigurationError, unknown_name
from shoal.types import Broadcast, LocalObjective, ModelState, Params, Update

Weighting = Literal["examples", "uniform"]


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Federated averaging: ``w ← w + server_lr · Σ nₖ Δₖ / Σ nₖ``.

    McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, 2017, algorithm 1; the
    server learning rate is that of Reddi et al., *Adaptive Federated Optimization*, 2021, algorithm 1.

    A method with another server optimizer overrides :meth:`init_slots` and :meth:`server_update` and nothing else.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    weighting: Weighting = "examples"
    """A client's share in the mean: its number of examples, or the same for all."""
    server_lr: float = 1.0
    """The step along the mean update, > 0; 1 is the plain average."""

    def __post_init__(self) -> None:
        if self.weighting not in get_args(Weighting):
            raise unknown_name("weighting", self.weighting, get_args(Weighting))
        self._require("server_lr", self.server_lr > 0, "> 0")

    def start(self, model: ModelState) -> ServerState:
        """Returns the state before the first round."""
        return ServerState(round=0, model=model, slots=self.init_slots(model.params))

    def broadcast(self, state: ServerState) -> Broadcast:
        """Returns the global model and the local objective for the next round."""
        return Broadcast(round=state.round + 1, model=state.model, objective=self.objective())

    def objective(self) -> LocalObjective:
        """Returns what clients minimise beside their task loss: here nothing."""
        return LocalObjective()

    def weight(self, update: Update) -> float:
        """Returns the client's share in the mean before normalisation."""
        return update.weight if self.weighting == "examples" else 1.0

    def step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Returns the state after a round: parameters by the server optimizer, buffers by their plain mean."""
        increment, slots = self.server_update(aggregate.delta, state.slots)
        model = ModelState(
            params=trees.advance(state.model.params, increment, consume=increment is aggregate.delta),
            buffers=trees.advance(state.model.buffers, aggregate.buffers, consume=True),
            constants=state.model.constants,
        )
        return ServerState(round=state.round + 1, model=model, slots=slots)

    def init_slots(self, params: Params) -> Mapping[str, Params]:  # noqa: ARG002 - a hook
        """Returns the server optimizer's trees before the first round."""
        return {}

    def server_update(self, delta: Params, slots: Mapping[str, Params]) -> tuple[Params, Mapping[str, Params]]:
        """The server optimizer.

        Args:
            delta: The mean update, which plays the part of a negative gradient; float64.
            slots: The optimizer's trees.

        Returns:
            What to add to the parameters, and the trees for the next round.
        """
        return delta if self.server_lr == 1 else trees.scaled(delta, self.server_lr), slots

    def describe(self) -> dict[str, Any]:
        """Returns the method's name and settings, as JSON."""
        return {"name": type(self).__name__, **dataclass_fields(self)}

    def _require(self, name: str, holds: bool, bound: str) -> None:
        if not holds:  # also for NaN, which fails every comparison
            raise ConfigurationError(f"{type(self).__name__}: {name} must be {bound}, not {getattr(self, name)}")
