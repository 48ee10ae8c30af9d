"""FedAvgM: federated averaging with momentum on the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal import trees
from shoal.algorithms.fedavg import FedAvg
from shoal.types import Params


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedAvg):
    """``v ← momentum · v + Δ``, ``w ← w + server_lr · v``.

    Hsu et al., *Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification*, 2019,
    section 4.3. ``momentum=0`` is FedAvg exactly.
    """

    momentum: float = 0.9
    """The share of the last step that is kept, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("momentum", 0 <= self.momentum < 1, "in [0, 1)")

    def init_slots(self, params: Params) -> Mapping[str, Params]:
        """Returns a velocity of zero."""
        return {"velocity": trees.zeros(params)}

    def server_update(self, delta: Params, slots: Mapping[str, Params]) -> tuple[Params, Mapping[str, Params]]:
        """Returns the step along the velocity, and the velocity."""
        velocity = trees.map_trees(lambda v, d: self.momentum * v + d, slots["velocity"], delta)
        return trees.scaled(velocity, self.server_lr), {"velocity": velocity}
