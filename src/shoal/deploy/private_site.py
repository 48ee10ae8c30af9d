"""Sites whose settings shoal writes itself: for one job, or to try things on one machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from shoal.deploy.site_settings import SETTINGS, Allowed, Limits, settings_text
from shoal.runs.files import storing, write_atomic

IDLE = 120.0
"""Seconds without a request after which such a site is free for another run."""


def write_site(folder: Path, name: str, allowed: Sequence[Allowed]) -> list[str]:
    """Writes a site's settings, and returns the command that starts it.

    Args:
        folder: The site's; it is made.
        name: The site's.
        allowed: What may run there.

    Raises:
        StorageError: The folder cannot be written.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SETTINGS, settings_text(name, allowed, Limits(idle=IDLE)))
    return [sys.executable, "-m", "shoal", "site", str(folder)]
