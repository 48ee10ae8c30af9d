"""FedAdam: Adam on the server."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.algorithms.adaptive import AdaptiveServer
from shoal.types import Array


@dataclass(frozen=True, kw_only=True)
class FedAdam(AdaptiveServer):
    """``v ← beta2·v + (1 − beta2)·Δ²``: Reddi et al., *Adaptive Federated Optimization*, 2021, algorithm 2."""

    beta2: float = 0.99
    """The decay of the second moment, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("beta2", 0 <= self.beta2 < 1, "in [0, 1)")

    def second_moment(self, v: Array, delta: Array) -> Array:
        """Returns the decayed mean of squares."""
        return self.beta2 * v + (1 - self.beta2) * delta**2
