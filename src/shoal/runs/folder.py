"""A run's folder: one configuration, one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Self, TypeVar

from shoal.description import differences
from shoal.errors import RunFolderError
from shoal.runs.files import require_space, storing, temporary_name, write_json
from shoal.runs.metrics import read_metrics

T = TypeVar("T")

CONFIG = "config.json"
LOCK = "run.lock"
METRICS = "metrics.jsonl"
PARTITION = "partition.json"
CLASSES = "classes.json"


class RunFolder:
    """An open run folder, locked against other processes until :meth:`close` or the end of this one.

    Use :meth:`open`. The configuration has three parts: ``identity`` decides the numbers and must be equal at a resume,
    ``options`` may change then, ``environment`` says what the run was made with.
    """

    def __init__(self, path: Path, lock: FileIO, notices: list[str]) -> None:
        self.path = path
        self.notices = notices
        """One line each: how the environment differs from that of the run's first part."""
        self._lock = lock

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any], *, resume: bool, space: int = 0) -> Self:
        """Creates the folder of a new run, or opens that of the run to resume. A refusal changes nothing.

        Args:
            path: The folder.
            config: The run's ``identity``, ``options`` and ``environment``, as JSON.
            resume: Whether the folder must hold this run already.
            space: Bytes that the run will need at least.

        Raises:
            RunFolderError: The folder holds something else, another process uses it, or there is nothing to resume.
            StorageError: The folder cannot be written, or its disk is too full.
        """
        config = json.loads(json.dumps(config))  # as it will read back: tuples as lists
        exists = path.exists()
        _require_fit(path, resume=resume)
        require_space(path, space)
        with storing(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path / LOCK)
        try:
            notices = _reconcile(path, config, resume=resume)
            write_json(path / CONFIG, config)
        except BaseException:
            _leave_no_trace(path, lock, existed=exists)
            raise
        return cls(path, lock, notices)

    @staticmethod
    def check(path: Path, *, resume: bool) -> None:
        """Refuses what :meth:`open` would refuse of any run, before that has begun to start what it needs.

        Args:
            path: The folder.
            resume: Whether it must hold a run already.

        Raises:
            RunFolderError: The folder holds something else, another process uses it, or there is nothing to resume.
        """
        _require_fit(path, resume=resume)
        if (path / LOCK).exists():
            _locked(path / LOCK).close()

    def close(self) -> None:
        """Lets other processes use the folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def metrics(self) -> Path:
        """The file with one JSON object a round."""
        return self.path / METRICS

    @property
    def partition(self) -> Path:
        """The file with the partition's picture."""
        return self.path / PARTITION

    @property
    def classes(self) -> Path:
        """The file with the report by class."""
        return self.path / CLASSES

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The folder of the TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def model(self) -> Path:
        """The file of the model to use."""
        return self.path / "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run's folder says, for its readers."""

    name: str
    """The folder's own name."""
    path: Path
    """The folder."""
    config: dict[str, Any]
    """``identity``, ``options`` and ``environment``."""
    metrics: list[dict[str, Any]]
    """One object a round, or an epoch."""
    partition: dict[str, Any] | None
    """The partition's picture; None where there is none."""
    classes: list[dict[str, Any]] | None
    """How each class was told from the others; None where that is not known."""

    @property
    def unit(self) -> str:
        """What the run goes on by: a federation by rounds, a training by epochs."""
        return "round" if "algorithm" in self.config.get("identity", {}) else "epoch"


def is_run(path: Path) -> bool:
    """Tells whether a folder holds a run."""
    return (path / CONFIG).exists()


def read_run(path: Path) -> RunData:
    """Reads a run's folder, also while the run goes on.

    Raises:
        RunFolderError: It is no run folder, or its configuration cannot be read.
    """
    if not path.is_dir():
        raise RunFolderError(f"there is no run folder {path}")
    if not is_run(path):
        raise RunFolderError(f"{path} is no run folder: it has no {CONFIG}")
    partition, classes = path / PARTITION, path / CLASSES
    return RunData(
        name=path.resolve().name,
        path=path,
        config=_read_json(path / CONFIG, dict),
        metrics=read_metrics(path / METRICS),
        partition=_read_json(partition, dict) if partition.exists() else None,
        classes=_read_json(classes, list) if classes.exists() else None,
    )


def _require_run_or_empty(path: Path) -> None:
    if not path.is_dir():
        raise RunFolderError(f"{path} is a file: choose another run folder")
    names = {entry.name for entry in path.iterdir()}
    others = names - {LOCK, temporary_name(CONFIG)}  # these a process leaves that was killed while it began a run
    if CONFIG not in names and others:
        raise RunFolderError(f"{path} holds other things ({min(others)}, …) and no run: choose another run folder")


def _require_fit(path: Path, *, resume: bool) -> None:
    if path.exists():
        _require_run_or_empty(path)
    if resume and not is_run(path):
        raise RunFolderError(f"there is no run to resume in {path}; leave --resume out to begin one")


def _locked(path: Path) -> FileIO:
    """Returns the lock file, locked; the operating system unlocks it when the process ends, however it ends."""
    with storing(path):
        stream = FileIO(path, "a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.seek(0)
        holder = stream.read(200).decode(errors="replace").strip() or "another process"
        stream.close()
        raise RunFolderError(f"{path.parent} is in use by {holder}: wait, or choose another --run-dir") from error
    if not path.exists() or path.stat().st_ino != os.fstat(stream.fileno()).st_ino:
        stream.close()  # its owner gave up and removed it in between
        return _locked(path)
    with storing(path):
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return stream


def _reconcile(path: Path, config: Mapping[str, Any], *, resume: bool) -> list[str]:
    """Compares the folder's configuration with the one asked for; returns notices."""
    if not is_run(path):
        return []
    found = _read_json(path / CONFIG, dict)
    if different := differences(found.get("identity", {}), config["identity"]):
        shown = "; ".join(f"{key}: {then!r} there, {now!r} here" for key, then, now in different[:3])
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise RunFolderError(
            f"{path} belongs to another configuration ({shown}{more}): choose another --run-dir, or the same settings"
        )
    if not resume:
        raise RunFolderError(f"{path} holds this run already: add --resume to go on, or choose another --run-dir")
    told = ("versions", "platform", "engine", "devices")
    before, now = ({key: part.get("environment", {}).get(key) for key in told} for part in (found, config))
    return [f"{key} was {old} and is now {new}" for key, old, new in differences(before, now)]


def _read_json(path: Path, kind: type[T]) -> T:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise RunFolderError(f"{path} cannot be read: it holds no JSON {'object' if kind is dict else 'list'}")
    return content


def _leave_no_trace(path: Path, lock: FileIO, *, existed: bool) -> None:
    """Removes what a refused opening has made. Only who holds the lock may: without it, the files are another's."""
    if not is_run(path):
        (path / LOCK).unlink(missing_ok=True)
    lock.close()
    if not existed:
        with contextlib.suppress(OSError):
            path.rmdir()
