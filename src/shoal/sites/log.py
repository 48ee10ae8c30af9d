"""What a site's processes write: kept in a file, and shown."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from shoal.runs.files import storing

LINES = 20
"""How many of a rank's last lines are told with its failure."""

UNKEPT = 10_000
"""How many lines wait at most for a file to be written to."""

OF_RANK = re.compile(rb"rank (\d+): (.*)", re.DOTALL)


def print_line(line: str) -> None:
    """Shows a line beside a progress display, which takes over standard error."""
    sys.stderr.write(f"{line}\n")


class SiteLog:
    """Reads what a site's launcher passes on, until that ends: lines, each headed by its rank.

    Args:
        name: The site's.
        all_shown: Whether to show what every rank writes, and not only rank 0.
        show: Is given each line to show.
    """

    def __init__(self, name: str, *, all_shown: bool, show: Callable[[str], None] = print_line) -> None:
        self.path: Path | None = None
        """The file with all of it; None while there is none."""
        self._name = name
        self._all_shown = all_shown
        self._show = show
        self._last: dict[int | None, deque[str]] = {}
        self._file: IO[bytes] | None = None
        self._unkept: deque[bytes] = deque(maxlen=UNKEPT)
        self._lock = threading.Lock()  # the file and what waits for it
        self._threads: list[threading.Thread] = []

    def keep(self, path: Path) -> None:
        """Writes all lines to a file from now on, after those that have come before.

        Raises:
            StorageError: It cannot be written.
        """
        with self._lock, storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self._file.writelines(self._unkept)
            self._unkept.clear()
            self.path = path

    def follow(self, stream: IO[bytes]) -> None:
        """Reads a stream to its end, in a thread."""
        thread = threading.Thread(target=self._read, args=(stream,), name=f"shoal-log-{self._name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def last(self, rank: int | None) -> Sequence[str]:
        """Returns the last lines of a rank, or of the launcher itself."""
        return tuple(self._last.get(rank, ()))

    @property
    def ended(self) -> bool:
        """Whether the end of what is read has come."""
        return bool(self._threads) and not any(thread.is_alive() for thread in self._threads)

    def close(self, within: float) -> None:
        """Waits for the end of what is read, at most so long; of what comes later nothing is kept."""
        for thread in self._threads:
            thread.join(within)
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._take(line)

    def _take(self, line: bytes) -> None:
        with self._lock:
            if self._file is None:
                self._unkept.append(line)
            else:
                with contextlib.suppress(OSError):  # the disk is full: the run's own files will tell of it
                    self._file.write(line)
        found = OF_RANK.fullmatch(line.rstrip(b"\r\n"))
        rank = int(found[1]) if found else None
        text = (found[2] if found else line.rstrip(b"\r\n")).decode(errors="replace")
        self._last.setdefault(rank, deque(maxlen=LINES)).append(text)
        if self._all_shown or rank == 0:
            # What the ranks write is read on, also where nobody can be shown it: they would wait, or fail.
            with contextlib.suppress(OSError, ValueError):
                self._show(f"{self._name}: {text}" if rank in (None, 0) else f"{self._name} rank {rank}: {text}")
