"""The folders of runs that were given none, and how to go on with one."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from shoal.errors import RunFolderError

RUNS = Path("runs")
"""Where runs go that are given no folder."""


def new_folders(name: str) -> Iterator[Path]:
    """Yields names for a run's folder that are free at this moment: runs/digits-0001 and so on."""
    every = (RUNS / f"{name}-{number:04d}" for number in itertools.count(1))
    return (path for path in every if not path.exists())


def in_new_folder(name: str, run: Callable[[Path], None]) -> None:
    """Calls a function with a new folder for a run, and once more if another process takes that first."""
    for path in new_folders(name):
        try:
            run(path)
        except RunFolderError:
            if not path.exists():
                raise
            continue  # another process has taken the name in the meantime
        return


def reserved_folder(name: str) -> Path:
    """Makes an empty folder for a run, which other processes will fill."""
    for path in new_folders(name):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("the names do not end")


def resume_command(path: Path) -> str:
    """Returns what to type to go on with this process's run."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    if not any(word == "--run-dir" or word.startswith("--run-dir=") for word in words):
        words += ["--run-dir", str(path)]
    return shlex.join(["shoal", *words, "--resume"])
