"""FedYogi: Yogi on the server."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.algorithms.adaptive import AdaptiveServer
from shoal.types import Array


@dataclass(frozen=True, kw_only=True)
class FedYogi(AdaptiveServer):
    """``v ← v − (1 − beta2)·Δ²·sign(v − Δ²)``: Reddi et al., *Adaptive Federated Optimization*, 2021, algorithm 2."""

    beta2: float = 0.99
    """How slowly the second moment follows, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("beta2", 0 <= self.beta2 < 1, "in [0, 1)")

    def second_moment(self, v: Array, delta: Array) -> Array:
        """Returns the second moment moved towards Δ² by a step that does not depend on their distance."""
        square = delta**2
        sign = 1.0 * (v > square) - 1.0 * (v < square)
        return v - (1 - self.beta2) * square * sign
