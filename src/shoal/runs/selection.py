"""Which model of a run is the best, and whether the run should stop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

USUAL = ("accuracy", "client_accuracy", "loss", "client_loss")
"""What a model is chosen by where nothing was named."""


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """By what a run's models are compared, and when it stops."""

    limit: int
    """How many rounds or epochs it has at most."""
    unit: str
    """What these are called: "round" or "epoch"."""
    metric: str | None = None
    """What models are chosen by; None: the first of :data:`USUAL` that is measured. Losses and errors count down."""
    target: float | None = None
    """Stop when the metric has reached this."""
    patience: int | None = None
    """Stop after so many rounds or epochs without a better metric."""
    max_seconds: float | None = None
    """Stop when so much time has passed."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best model so far."""

    number: int
    """After which round or epoch."""
    metric: str
    """What it was chosen by."""
    value: float
    """The metric's value."""


class Selection:
    """Follows the metric of a run's model.

    Args:
        criteria: How.
        best: The best one so far.
    """

    def __init__(self, criteria: Criteria, best: Choice | None = None) -> None:
        self._criteria = criteria
        self.best = best

    def update(self, number: int, measured: Mapping[str, float]) -> bool:
        """Takes the metrics of a model; tells whether it is the best so far. Of equals the first stays."""
        metric = self._criteria.metric or next((name for name in USUAL if name in measured), next(iter(measured)))
        value = measured[metric]
        if math.isnan(value) or (self.best is not None and not better(metric, value, self.best.value)):
            return False
        self.best = Choice(number=number, metric=metric, value=value)
        return True

    def stop_reason(self, done: int, elapsed: float) -> str | None:
        """Returns why the run should end after so many rounds or epochs and seconds, or None."""
        criteria, best = self._criteria, self.best
        if done >= criteria.limit:
            return f"all {criteria.unit}s done"
        if criteria.max_seconds is not None and elapsed >= criteria.max_seconds:
            return f"{criteria.max_seconds:g} seconds have passed"
        if best is None:
            return None
        if criteria.target is not None and not better(best.metric, criteria.target, best.value):
            return f"{best.metric} has reached {criteria.target:g}"
        if criteria.patience is not None and done - best.number >= criteria.patience:
            return f"{best.metric} has not improved for {criteria.patience} {criteria.unit}s"
        return None


def best_record(records: Iterable[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """Returns the record with the best value of a metric, of equals the first; None where none has a value."""
    best: Mapping[str, Any] | None = None
    for record in records:
        value = record.get(metric)
        if value is not None and (best is None or better(metric, value, best[metric])):
            best = record
    return best


def better(metric: str, value: float, than: float) -> bool:
    """Tells whether a metric's value is better than another; losses and errors count down."""
    counts_down = "loss" in metric or "error" in metric
    return value < than if counts_down else value > than
