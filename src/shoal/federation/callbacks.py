"""What a user can hang into a federation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.federation.result import FederationResult

Record = Mapping[str, Any]
"""What is known of one round: the object that becomes its line in ``metrics.jsonl``."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run as its callbacks see it at the start."""

    name: str
    """The experiment's name."""
    rounds: int
    """Number of rounds that the run will reach, if nothing stops it."""
    first_round: int
    """The round it begins with; above 1 after a resume."""
    population: int
    """Number of clients."""
    cohort: int
    """Number of clients in a round."""
    run_dir: Path | None
    """The run's folder."""
    notices: tuple[str, ...]
    """One line each: which engine was chosen, what was found at a resume."""


class Callback:
    """Does nothing; override what you need."""

    def on_run_start(self, run: RunInfo) -> None:
        """Called once, before the first round."""

    def on_client_end(self, round: int, client: int, error: Exception | None) -> None:
        """Called when a client's update has been added to the sum, or the client has failed."""

    def on_round_end(self, record: Record) -> str | None:
        """Called after each round, before its state is saved.

        Returns:
            A reason to stop after this round, or None to go on.
        """

    def on_run_end(self, result: FederationResult) -> None:
        """Called once, after everything is written."""

    def close(self) -> None:
        """Called at the very end, also after an error or Ctrl-C."""
