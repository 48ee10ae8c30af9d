"""Which round's model is the best, and whether the run should stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.federation.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best global model so far."""

    round: int
    """After which round."""
    metric: str
    """What it was chosen by."""
    value: float
    """The metric's value."""


class Selection:
    """Follows the metric of the global model from round to round.

    Args:
        experiment: Names the metric and the criteria to stop.
        best: The best round so far.
    """

    def __init__(self, experiment: Experiment, best: Best | None = None) -> None:
        self._experiment = experiment
        self.best = best

    def update(self, round: int, measured: Mapping[str, float]) -> bool:
        """Takes the metrics of a round's model; tells whether it is the best so far. Of equals the first stays."""
        metric = self._metric(measured)
        value = measured[metric]
        if math.isnan(value) or (self.best is not None and not self._better(metric, value, self.best.value)):
            return False
        self.best = Best(round=round, metric=metric, value=value)
        return True

    def stop_reason(self, rounds_done: int, elapsed: float) -> str | None:
        """Returns why the run should end after the rounds it has done, or None."""
        experiment, best = self._experiment, self.best
        if rounds_done >= experiment.rounds:
            return "all rounds done"
        if experiment.max_seconds is not None and elapsed >= experiment.max_seconds:
            return f"{experiment.max_seconds:g} seconds have passed"
        if best is None:
            return None
        if experiment.target is not None and not self._better(best.metric, experiment.target, best.value):
            return f"{best.metric} has reached {experiment.target:g}"
        if experiment.patience is not None and rounds_done - best.round >= experiment.patience:
            return f"{best.metric} has not improved for {experiment.patience} rounds"
        return None

    def _metric(self, measured: Mapping[str, float]) -> str:
        if self._experiment.metric is not None:
            return self._experiment.metric
        usual = ("accuracy", "client_accuracy", "loss", "client_loss")
        return next((name for name in usual if name in measured), next(iter(measured)))

    @staticmethod
    def _better(metric: str, value: float, than: float) -> bool:
        counts_down = "loss" in metric or "error" in metric
        return value < than if counts_down else value > than
