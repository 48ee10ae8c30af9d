"""Ctrl-C at the right moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from shoal.errors import Terminated


@contextmanager
def deferred(*signals: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Holds signals back until the block has ended: what it does belongs together.

    Outside the main thread, where Python delivers no signals, it does nothing.

    Yields:
        What tells whether one has come.
    """
    pending: list[tuple[int, FrameType | None]] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in signals}
    for number in before:
        signal.signal(number, lambda signum, frame: pending.append((signum, frame)))
    try:
        yield lambda: bool(pending)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for signum, frame in pending[:1]:
            _deliver(before[signal.Signals(signum)], signum, frame)


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """Has SIGTERM end the block as Ctrl-C does, so that what it keeps is saved; where nobody else handles it.

    Raises:
        Terminated: It came.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _deliver(handler: Any, signum: int, frame: FrameType | None) -> None:
    if callable(handler):
        handler(signum, frame)
    elif handler == signal.SIG_DFL:
        signal.raise_signal(signum)
