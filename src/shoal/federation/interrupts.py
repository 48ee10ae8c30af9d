"""Ctrl-C and other workers' news at the right moment."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager

from shoal.engines import ALARM
from shoal.runs import deferred


def deferred_interrupts() -> AbstractContextManager[object]:
    """Holds SIGINT, SIGTERM and the workers' alarm back until the block has ended."""
    return deferred(signal.SIGINT, signal.SIGTERM, ALARM)
