"""A process that this package's own command has started to run the same command with others."""

from __future__ import annotations

import os
import signal

from shoal.errors import Terminated

LAUNCHER = "SHOAL_LAUNCHER"
"""Set in the environment of such a process: the id of the one that started it."""


def end_with_launcher() -> None:
    """Lets the system end this process when its launcher ends, however that ends."""
    if LAUNCHER not in os.environ:
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHER]):
        raise Terminated
