"""What a process does at a signal, kept from libraries that take it for their own."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

LARGEST = 512
"""Bytes that the system's description of a handler takes at most."""


@contextlib.contextmanager
def handler_kept(number: int) -> Iterator[None]:
    """Undoes, when the context ends, whatever has replaced a signal's handler, Python's or another, in any thread.

    Args:
        number: The signal's.
    """
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(LARGEST)
    libc.sigaction(int(number), None, before)
    try:
        yield
    finally:
        libc.sigaction(int(number), before, None)
