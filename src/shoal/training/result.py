"""What a training leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.runs import report_on
from shoal.types import Params


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The best model so far."""

    epoch: int
    """After which epoch."""
    metric: str
    """What it was chosen by."""
    value: float
    """The metric's value."""


@dataclass(frozen=True, kw_only=True)
class ClassReport:
    """How one class of the held-out data was told from the others."""

    label: int
    """The class."""
    precision: float
    """Of those taken for it, the share that are; 0 where there are none."""
    recall: float
    """Of those that are, the share taken for it; 0 where there are none."""
    f1: float
    """The harmonic mean of both."""
    examples: int
    """How many there are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingResult:
    """The outcome of a training."""

    params: Params
    """The model to use, as the user's module loads it: the best one where models were measured, else the last."""
    last_params: Params
    """The model after the last step, in the same form."""
    best: BestEpoch | None
    """Which epoch ``params`` is from and its metric; None where nothing was measured."""
    history: Sequence[Mapping[str, Any]]
    """One object an epoch, as in ``metrics.jsonl``."""
    classes: Sequence[ClassReport]
    """``params`` class by class on the held-out data; empty where it has no classes."""
    stopped: str
    """Why the training ended."""
    run_dir: Path | None
    """The run's folder; None where none was asked for."""
    notices: tuple[str, ...] = ()
    """One line each that a reader of the result should know."""

    def report(self, target: str | Path | None = None) -> Path:
        """Writes the HTML report of the run and returns its path.

        Args:
            target: The file to write; None for ``report.html`` in the run's folder.

        Raises:
            ConfigurationError: The run has no folder to report on.
            MissingExtraError: The plotting library is not installed.
        """
        return report_on(self.run_dir, target)
