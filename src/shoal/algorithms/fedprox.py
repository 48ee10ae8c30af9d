"""FedProx: local training that is pulled back to the global model."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.algorithms.fedavg import FedAvg
from shoal.types import LocalObjective


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose clients minimise ``task loss + (mu / 2)·‖w − w_global‖²``.

    Li et al., *Federated Optimization in Heterogeneous Networks*, 2020, equation 2. ``mu=0`` is FedAvg exactly.
    """

    mu: float = 0.01
    """The strength of the proximal term, ≥ 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("mu", 0 <= self.mu < float("inf"), "≥ 0")

    def objective(self) -> LocalObjective:
        """Returns the proximal term."""
        return LocalObjective(proximal=self.mu)
