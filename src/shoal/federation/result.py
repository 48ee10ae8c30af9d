"""What a federation leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.runs import report_on
from shoal.types import Params


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best global model so far."""

    round: int
    """After which round."""
    metric: str
    """What it was chosen by."""
    value: float
    """The metric's value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FederationResult:
    """The outcome of a federation."""

    params: Params
    """The model to use, as the user's module loads it: the best one where models were measured, else the last."""
    last_params: Params
    """The global model after the last round, in the same form."""
    best: Best | None
    """Which round ``params`` is from and its metric; None where nothing was measured."""
    history: Sequence[Mapping[str, Any]]
    """One object a round, as in ``metrics.jsonl``."""
    stopped: str
    """Why the run ended."""
    run_dir: Path | None
    """The run's folder; None where none was asked for."""
    notices: tuple[str, ...] = ()
    """One line each that a reader of the result should know, such as a report that could not be drawn."""

    def report(self, target: str | Path | None = None) -> Path:
        """Writes the HTML report of the run and returns its path.

        Args:
            target: The file to write; None for ``report.html`` in the run's folder.

        Raises:
            ConfigurationError: The run has no folder to report on.
            MissingExtraError: The plotting library is not installed.
        """
        return report_on(self.run_dir, target)
