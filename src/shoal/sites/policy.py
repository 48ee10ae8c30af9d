"""What is done about sites that fail, or are slow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shoal.sites.state import Deadlines

OnFailure = Literal["stop", "continue", "restart"]


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What to do about sites that fail, or are slow."""

    on_failure: OnFailure = "stop"
    """``stop`` the run; ``continue`` without the site; or ``restart`` it, from the current global model."""
    max_restarts: int = 1
    """How often one site is started again; one more failure stops the run."""
    min_sites: int = 1
    """With how many replies a round may go on, where sites are late or have left."""
    deadline: float | None = None
    """Seconds after which a round goes on without the sites that have not replied; None to wait for all."""
    waits: Deadlines = field(default_factory=Deadlines)
    """After which times a site counts as failed."""
