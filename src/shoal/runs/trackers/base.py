"""What a tracker is to the process that hands a run's records to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from shoal.runs.trackers.process import Ending


class Tracker(Protocol):
    """Takes a run's records, in their order."""

    known: dict[str, str]
    """What is to be remembered to go on with the run: under ``id`` what the tracker calls it."""
    lasting: bool
    """Whether what was logged survives when this process is killed; otherwise only what was closed does."""

    def describe(self, config: Mapping[str, Any]) -> None:
        """Takes the run's ``config.json``."""
        ...  # pragma: no cover

    def log(self, number: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one round or epoch."""
        ...  # pragma: no cover

    def close(self, ending: Ending) -> None:
        """Lets go of files and connections, and says how the run ended."""
        ...  # pragma: no cover
