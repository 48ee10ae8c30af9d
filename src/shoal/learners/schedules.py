"""Learning rates over the steps of a training, whatever the framework."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from shoal.errors import ConfigurationError

Schedule = Callable[[int, int, int], float]
"""``schedule(step, steps, steps_per_epoch)`` returns what to multiply the optimizer's learning rates with in a step,
counted from 0, of so many."""


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Rises in a line from the first step on, then falls along half a cosine (Loshchilov & Hutter 2017, eq. 5).

    With W steps of warm-up and T steps in all, step t has the factor (t + 1) / W while t < W, and then
    floor + (1 − floor) · (1 + cos(π · (t − W) / (T − W))) / 2.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    warmup_epochs: float = 0.0
    """Passes over the data, ≥ 0, in which the rate rises; parts of one count."""
    floor: float = 0.0
    """The factor at the end, in [0, 1]."""

    def __post_init__(self) -> None:
        if not (self.warmup_epochs >= 0 and math.isfinite(self.warmup_epochs)):
            raise ConfigurationError(f"warmup_epochs must be a number ≥ 0, not {self.warmup_epochs}")
        if not 0 <= self.floor <= 1:
            raise ConfigurationError(f"the floor of a schedule must be in [0, 1], not {self.floor}")

    def __call__(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """Returns the factor of a step."""
        warmup = min(round(self.warmup_epochs * steps_per_epoch), steps)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(steps - warmup, 1)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2
