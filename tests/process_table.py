"""What tests of processes look at: who is alive, and what is open."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path


def children(pid: int) -> list[int]:
    """Returns the children of a process, those that have ended and were not waited for among them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(folder.name))
    return found


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
