"""What FedAdagrad, FedAdam and FedYogi share: algorithm 2 of *Adaptive Federated Optimization*."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from shoal import trees
from shoal.algorithms.fedavg import FedAvg
from shoal.types import Array, Params


@dataclass(frozen=True, kw_only=True)
class AdaptiveServer(FedAvg, ABC):
    """``m ← beta1·m + (1 − beta1)·Δ``, ``v`` as the method says, ``w ← w + server_lr · m / (√v + tau)``.

    Reddi et al., *Adaptive Federated Optimization*, 2021, algorithm 2: m starts at 0, v at tau², no bias is corrected.
    """

    server_lr: float = 0.1
    """The server's learning rate η, > 0."""
    beta1: float = 0.9
    """The decay of the first moment, in [0, 1)."""
    tau: float = 1e-3
    """The degree of adaptivity, > 0: how small a second moment may count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        self._require("tau", self.tau > 0, "> 0")

    def init_slots(self, params: Params) -> Mapping[str, Params]:
        """Returns m = 0 and v = tau²."""
        zero = trees.zeros(params)
        return {"m": zero, "v": trees.map_trees(lambda array: array + self.tau**2, zero)}

    def server_update(self, delta: Params, slots: Mapping[str, Params]) -> tuple[Params, Mapping[str, Params]]:
        """Returns the adaptive step and the two moments."""
        m = trees.map_trees(lambda old, d: self.beta1 * old + (1 - self.beta1) * d, slots["m"], delta)
        v = trees.map_trees(self.second_moment, slots["v"], delta)
        step = trees.map_trees(lambda first, second: self.server_lr * first / (second**0.5 + self.tau), m, v)
        return step, {"m": m, "v": v}

    @abstractmethod
    def second_moment(self, v: Array, delta: Array) -> Array:
        """Returns the next second moment of one array."""
