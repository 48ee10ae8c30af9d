"""One federation of sites to measure, and what is noted of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXPERIMENT = "payload"
"""The built-in experiment that is run."""


@dataclass(frozen=True, kw_only=True)
class SiteCase:
    """What is measured at a time."""

    engine: str
    """Which engine."""
    own: bool = False
    """Whether the engine's own FedAvg runs, and not shoal's federation."""
    size_mb: float
    """Size of the model in megabytes of float32."""
    sites: int
    """How many sites."""
    ranks: int
    """Processes of each."""
    rounds: int
    """Rounds that are timed; one more runs before them."""

    def settings(self) -> dict[str, str]:
        """Returns what the experiment is told."""
        told = {"size_mb": self.size_mb, "clients": self.sites, "rounds": self.rounds + 1}
        return {name: str(value) for name, value in told.items()}


@dataclass(frozen=True, kw_only=True)
class SiteRun:
    """What is known of a run."""

    records: Sequence[Mapping[str, Any]]
    """Of its rounds: ``seconds``, ``site_seconds`` by site, ``bytes_down`` and ``bytes_up``."""
    memory_bytes: int
    """The most that the server's processes took, beyond what they had before the run."""
