"""What a process gives back to the system while it goes on."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3

LARGE = 1 << 20
"""From how many bytes on memory is given back as soon as it is freed."""


def give_large_memory_back() -> None:
    """Has the memory of large arrays given back to the system as soon as they are freed, from now on.

    By itself glibc comes to keep it for arrays like it, in pieces between others that are in use; and so a process that
    makes a model anew in each round would hold half as much again as it needs. Other C libraries know no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
