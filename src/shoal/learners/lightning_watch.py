"""A deadline for ranks that Lightning starts and then waits for without one."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

START = 120.0
"""Seconds in which all ranks must have started and found each other."""

LOOK = 0.2
"""Seconds between two looks."""


def tell_started(folder: Path, rank: int) -> None:
    """Tells the process that watches the folder that a rank has found the others."""
    (folder / f"started-{rank}").touch()


class Watch:
    """Kills the ranks if they do not all start in time, so that the process that waits for them goes on.

    Args:
        launcher: Lightning's, which knows the processes.
        folder: Where the ranks tell that they have started.
        ranks: How many there are.
    """

    def __init__(self, launcher: Any, folder: Path, ranks: int) -> None:
        self._launcher = launcher
        self._missing = {folder / f"started-{rank}" for rank in range(ranks)}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="shoal-watch", daemon=True)
        self.late = ""
        """What was not in time; empty while all is well."""

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        deadline = time.monotonic() + START
        while not self._over.wait(LOOK):
            self._missing = {path for path in self._missing if not path.exists()}
            if not self._missing:
                return
            if time.monotonic() > deadline:
                ranks = ", ".join(sorted(path.name.removeprefix("started-") for path in self._missing))
                self.late = f"of the training's ranks {ranks} did not start within {START:g} s, and all were ended"
                self._launcher.kill(signal.SIGKILL)
                return
