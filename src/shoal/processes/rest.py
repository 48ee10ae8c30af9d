"""How a process that has trained in a group of ranks comes to its end."""

from __future__ import annotations

import atexit
import sys
import time
from functools import cache

REST = 0.1
"""Seconds."""


@cache
def rest_at_exit() -> None:
    """Lets the threads of ``torch.distributed`` come to rest before Python ends; a second call has no effect.

    After an exchange a thread of gloo's may hold the last reference to a tensor, and to let go of it waits for Python's
    lock. Before version 3.14 Python ends a thread that asks for the lock while it ends itself, in a way that C++ takes
    for a crash: ``terminate called without an active exception``, and the exit code says that the rank was aborted.
    To destroy the process group is not enough, because DistributedDataParallel holds on to it.
    """
    atexit.register(_rest)


def _rest() -> None:
    if "torch.distributed" in sys.modules:
        time.sleep(REST)  # without Python's lock
