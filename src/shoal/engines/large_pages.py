"""Memory in large pages: a fork copies an entry for each page, and there are tens of thousands of the usual size."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")

MADV_COLLAPSE = 25


def use_large_pages() -> None:
    """Moves this process's memory into large pages, where the system has them and the user has not turned them off.

    With Python and torch in memory a fork and the child's end then take a third of the time. It takes half a second
    itself, and what was shared with the process that this one was forked from is then in memory twice. Linux can do it
    from 6.1 on; before, nothing happens.
    """
    with contextlib.suppress(OSError):  # a system without them
        if "[never]" in (SETTINGS / "enabled").read_text(encoding="utf-8"):
            return
        page = int((SETTINGS / "hpage_pmd_size").read_text(encoding="utf-8"))
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, end in _own_memory():
            first, last = -(-start // page) * page, end // page * page
            if first < last:
                madvise(first, last - first, MADV_COLLAPSE)


def _own_memory() -> Iterator[tuple[int, int]]:
    """Yields the address ranges that belong to no file, and of which at least half is in memory."""
    start = end = 0
    anonymous = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            start, end = (int(address, 16) for address in words[0].split("-"))
            anonymous = words[1] == "rw-p" and (len(words) == 5 or words[5] == "[heap]")
        elif words[0] == "Rss:" and anonymous and 2 * 1024 * int(words[1]) >= end - start:
            yield start, end
