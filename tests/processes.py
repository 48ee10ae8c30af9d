"""What tests of processes look at: who is alive, and what is open."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def children(pid: int) -> list[int]:
    """Returns the children of a process, those that have ended and were not waited for among them."""
    return [child for child, (parent, _) in _table().items() if parent == pid]


def members(group: int) -> list[int]:
    """Returns the processes of a group that have not ended."""
    return [pid for pid, (_, own) in _table().items() if own == group]


def alive(pid: int) -> bool:
    """Tells whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def open_files() -> list[str]:
    """Returns what this process has open."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        try:
            found.append(f"{file.name} {file.readlink()}")
        except OSError:  # the one that the listing itself had
            continue
    return sorted(found)


def eventually(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    """Waits for a condition, and tells whether it came true."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


def _table() -> dict[int, tuple[int, int]]:
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[1:3]
        except OSError:  # it has ended meanwhile
            continue
        found[int(folder.name)] = (int(parent), int(group))
    return found
