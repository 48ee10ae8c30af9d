"""FedAdagrad: Adagrad on the server."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.algorithms.adaptive import AdaptiveServer
from shoal.types import Array


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(AdaptiveServer):
    """``v ← v + Δ²``: Reddi et al., *Adaptive Federated Optimization*, 2021, algorithm 2, with beta1 = 0 as there."""

    beta1: float = 0.0
    """The decay of the first moment, in [0, 1)."""

    def second_moment(self, v: Array, delta: Array) -> Array:
        """Returns the sum of squares."""
        return v + delta**2
