"""The memory of a server that is several processes, some of which come and go with a run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from shoal.processes.memory import most_resident

LOOK = 0.5
"""Seconds between two looks; a process itself remembers the most that it had."""

RESET = "5"
"""What has the system forget the most memory that a process had."""


class ServerMemory:
    """Watches a process and all that descend from it, while it is a context.

    Args:
        root: The process.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._most: dict[int, int] = {}
        self._before: Mapping[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="shoal-memory", daemon=True)

    def __enter__(self) -> Self:
        for pid in descendants(self._root):
            with contextlib.suppress(OSError):  # then an earlier run's most is taken for this one's
                Path(f"/proc/{pid}/clear_refs").write_text(RESET)
        self._before = {pid: most_resident(pid) for pid in descendants(self._root)}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._over.set()
        self._thread.join()

    @property
    def most(self) -> int:
        """The bytes that they took beyond what they had before: the sum of each one's most."""
        return sum(most - self._before.get(pid, 0) for pid, most in self._most.items())

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            self._look()

    def _look(self) -> None:
        for pid in descendants(self._root):
            self._most[pid] = max(self._most.get(pid, 0), most_resident(pid))


def descendants(root: int) -> list[int]:
    """Returns a process and those that it has started, and those that they have, while each one's parent lives."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):  # it is gone
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found
