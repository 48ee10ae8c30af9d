"""What memory a process has, and what it gives back to the system while it goes on."""

from __future__ import annotations

import ctypes
from pathlib import Path

M_MMAP_THRESHOLD = -3

LARGE = 1 << 18
"""From how many bytes on memory is given back as soon as it is freed."""


def give_large_memory_back() -> None:
    """Has the memory of large arrays given back to the system as soon as they are freed, from now on.

    By itself glibc comes to keep it for arrays like it, in pieces between others that are in use; and so a process that
    makes a model anew in each round would hold half as much again as it needs. Other C libraries know no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


def resident() -> int:
    """Returns the memory that this process has now, in bytes; 0 where the system does not tell."""
    return _told("self", "VmRSS")


def most_resident(pid: int | None = None) -> int:
    """Returns the most memory that a process has had at any time, in bytes; 0 where the system does not tell.

    Args:
        pid: Which; None for this one.
    """
    return _told("self" if pid is None else str(pid), "VmHWM")


def _told(process: str, field: str) -> int:
    """Returns a line of a process's status, which is in KiB."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
