"""What a tracker is to the process that hands a run's records to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from shoal.runs.trackers.process import Ending


class Tracker(Protocol):
    """Takes a run's records, in their order."""

    id: str
    """What the tracker calls the run; a resumed run goes on with it."""
    place: str
    """Where the tracker keeps it, as a digest: what is kept in one place is not gone on with in another."""

    def describe(self, config: Mapping[str, Any]) -> None:
        """Takes the run's ``config.json``."""
        ...  # pragma: no cover

    def log(self, number: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one round or epoch."""
        ...  # pragma: no cover

    def close(self, ending: Ending) -> None:
        """Lets go of files and connections, and says how the run ended."""
        ...  # pragma: no cover
