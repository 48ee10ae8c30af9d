"""A run's folder on its way back: as lines of the run's log, the only thing that Flower brings to who submitted it."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.errors import EngineError, RunFolderError
from shoal.runs.files import is_taken, storing, sync_file, sync_folder, temporary_name

PARTS = ("config.json", "metrics.jsonl", "partition.json", "classes.json", "model.safetensors", "report.html")
"""The files that are brought: what says how the run went, and what came of it."""

LARGEST = 64_000_000
"""Bytes of all of them together; a log is no place for more."""

CHUNK = 6144
"""Bytes in a line, which is a third longer."""

MARK = "shoal-file"


def packed(folder: Path, nonce: str, *, largest: int = LARGEST) -> Iterator[str]:
    """Yields a run's folder as lines: first what there is, then its bytes.

    Args:
        folder: The run's.
        nonce: What the lines are recognised by.
        largest: Bytes of all files together; of more, the lines only say where they lie.
    """
    found = [folder / name for name in PARTS if (folder / name).is_file()]
    total = sum(path.stat().st_size for path in found)
    told: dict[str, Any] = {"host": socket.gethostname(), "folder": str(folder), "bytes": total, "files": []}
    if total <= largest:
        told["files"] = [{"name": path.name, "bytes": path.stat().st_size, "sha256": _digest(path)} for path in found]
    yield f"{MARK} {nonce} {json.dumps(told)}"
    if total > largest:
        return
    for path in found:
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                yield f"{MARK} {nonce} {base64.b64encode(data).decode()}"


class Parts:
    """Collects the lines of :func:`packed`.

    Args:
        nonce: What the lines are recognised by.
        folder: Where the run's folder is written, which must not be there or be empty.

    Raises:
        RunFolderError: There is something in it.
    """

    def __init__(self, nonce: str, folder: Path) -> None:
        if is_taken(folder):
            raise RunFolderError(f"{folder} is there already: name a new folder for the run")
        self._head = f"{MARK} {nonce} "
        self._folder = folder
        self._told: dict[str, Any] | None = None
        self._temporary = folder.with_name(temporary_name(folder.name))
        self._name, self._left, self._later = "", 0, []  # type: str, int, list[tuple[str, int]]

    def take(self, line: str) -> bool:
        """Takes a line; returns whether it is one of these.

        Raises:
            EngineError: It is damaged.
            StorageError: It cannot be written.
        """
        if not line.startswith(self._head):
            return False
        text = line.removeprefix(self._head)
        try:
            if self._told is None:
                self._begin(json.loads(text))
            else:
                self._add(base64.b64decode(text, validate=True))
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"the run's folder came back damaged: {error}") from error
        return True

    def finish(self) -> str:
        """Puts the folder under its name, if all of it is there and as it was sent.

        Returns:
            Where the run's folder is, in words.

        Raises:
            EngineError: It is not.
            StorageError: It cannot be written.
        """
        if self._told is None:
            raise EngineError("the run's folder did not come back: its log has no line of it")
        where = f"{self._told['folder']} on {self._told['host']}"
        if not self._told["files"]:
            return f"the run's folder has {self._told['bytes'] / 1e6:.1f} MB, too much for a log: it stays in {where}"
        for entry in self._told["files"]:
            path = self._temporary / entry["name"]
            if not path.is_file() or _digest(path) != entry["sha256"]:
                raise EngineError(f"{entry['name']} did not come back whole; the run's folder is {where}")
        with storing(self._folder):
            for entry in self._told["files"]:
                sync_file(self._temporary / entry["name"])
            if self._folder.exists():
                self._folder.rmdir()
            self._temporary.rename(self._folder)
            sync_folder(self._folder.parent)
        return f"the run is in {self._folder}; its checkpoints stay in {where}"

    def close(self) -> None:
        """Removes what has not become a folder."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _begin(self, told: dict[str, Any]) -> None:
        files = [(str(entry["name"]), int(entry["bytes"])) for entry in told["files"]]
        if any(name not in PARTS for name, _ in files) or sum(size for _, size in files) > LARGEST:
            raise ValueError("it has files that no run brings back")
        self._told, self._later = told, files
        shutil.rmtree(self._temporary, ignore_errors=True)
        with storing(self._temporary):
            self._temporary.mkdir(parents=True)
            for name, _ in files:
                (self._temporary / name).touch()

    def _add(self, data: bytes) -> None:
        while not self._left and self._later:
            self._name, self._left = self._later.pop(0)
        if len(data) > self._left:
            raise ValueError("there is more of it than was said")
        with storing(self._temporary), (self._temporary / self._name).open("ab") as file:
            file.write(data)
        self._left -= len(data)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
