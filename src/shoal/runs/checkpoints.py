"""Checkpoints: safetensors and JSON in a folder each, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoal import trees
from shoal.errors import CheckpointError, ConfigurationError
from shoal.runs.files import storing, sync_file, sync_folder, temporary_name, write_json
from shoal.types import Array, Params

FORMAT = 1
TENSORS = "state.safetensors"
DESCRIPTION = "state.json"
UNFINISHED = ".writing-"
LATEST, BEST = "latest", "best"


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A state as it was read back."""

    number: int
    """After which round or step it was written."""
    tensors: dict[str, Array]
    """Arrays of the kind that was saved, on the CPU."""
    meta: dict[str, Any]
    """The caller's own JSON."""
    notices: list[str] = field(default_factory=list)
    """One line for each newer checkpoint that could not be read."""


class Checkpoints:
    """The checkpoints of a run: the latest few, and the best. Links of these names lead to them.

    Args:
        folder: Where they are; it need not exist.
        keep: How many of the latest to keep, ≥ 1.
        unit: What they are numbered by: "round" or "step".
    """

    def __init__(self, folder: Path, *, keep: int, unit: str = "round") -> None:
        self._folder = folder
        self._keep = keep
        self._unit = unit

    def save(self, number: int, tensors: Params, meta: Mapping[str, Any], *, best: int | None) -> None:
        """Writes a checkpoint and removes those that are no longer kept.

        Args:
            number: The last round or step that the state includes.
            tensors: A flat tree of numpy arrays or torch tensors.
            meta: Anything else that is JSON.
            best: The number of the best checkpoint, which is kept beside the latest.

        Raises:
            StorageError: The disk is full or refuses; the checkpoints before are whole.
            ConfigurationError: safetensors has no such dtype, for instance numpy's complex128.
        """
        target = self._path(number)
        temporary = self._folder / f"{UNFINISHED}{target.name}"
        with storing(target):
            if not self._folder.exists():
                self._folder.mkdir()
                sync_folder(self._folder.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                save_tensors(temporary / TENSORS, tensors)
                description = {
                    "format": FORMAT,
                    self._unit: number,
                    "framework": trees.framework(tensors),
                    "sha256": _sha256(temporary / TENSORS),
                    "best": best,
                    "meta": meta,
                }
                write_json(temporary / DESCRIPTION, description)
                sync_folder(temporary)
                temporary.rename(target)
                sync_folder(self._folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        self._prune()
        self._point(LATEST, number)
        if best is not None:
            self._point(BEST, best)

    def load(self, number: int) -> Checkpoint:
        """Reads one checkpoint.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        path = self._path(number)
        try:
            description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
            _check(description, path)
            tensors = _load_tensors(path / TENSORS, description["framework"])
            return Checkpoint(number=description[self._unit], tensors=tensors, meta=description["meta"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path.name} is damaged ({error})") from error

    def load_latest(self) -> Checkpoint | None:
        """Reads the newest checkpoint that is whole; None where none was ever written.

        Raises:
            CheckpointError: There are checkpoints, and every one is damaged.
        """
        notices: list[str] = []
        for number in sorted(self.numbers(), reverse=True):
            try:
                found = self.load(number)
            except CheckpointError as error:
                notices.append(str(error))
                continue
            told = [f"{notice}; going on from {self._path(found.number).name}" for notice in notices]
            return Checkpoint(number=found.number, tensors=found.tensors, meta=found.meta, notices=told)
        if notices:
            raise CheckpointError(f"no checkpoint in {self._folder} can be read: {notices[0]}")
        return None

    def discard_after(self, number: int) -> None:
        """Removes later checkpoints, damaged ones among them, and what a crash left unfinished."""
        for later in [other for other in self.numbers() if other > number]:
            self._remove(self._path(later))
        for leftover in self._folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover)
        for name in (LATEST, BEST):
            if (link := self._folder / name).is_symlink() and not link.exists():
                link.unlink()

    def numbers(self) -> list[int]:
        """Returns the rounds or steps that there are checkpoints of, ascending."""
        names = [path.name.partition("-")[2] for path in self._folder.glob(f"{self._unit}-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def _point(self, name: str, number: int) -> None:
        """Lets a name lead to a checkpoint, for people: what is loaded is found by number."""
        temporary = self._folder / temporary_name(name)
        with contextlib.suppress(OSError):  # a disk without links does without
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(self._path(number).name)
            temporary.rename(self._folder / name)

    def _prune(self) -> None:
        numbers = self.numbers()
        kept = set(numbers[-self._keep :])
        # Each of the latest may be the one to go on from, if newer ones turn out damaged; then its best is needed.
        kept |= {best for latest in kept if (best := self._best_of(latest)) is not None}
        for old in set(numbers) - kept:
            self._remove(self._path(old))

    def _best_of(self, number: int) -> int | None:
        try:
            best = json.loads((self._path(number) / DESCRIPTION).read_text(encoding="utf-8"))["best"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return best if isinstance(best, int) else None

    def _remove(self, path: Path) -> None:
        """Removes a checkpoint under another name first, so that a crash leaves no half of one."""
        doomed = self._folder / f"{UNFINISHED}{path.name}"
        with storing(path):
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._unit}-{number:06d}"


def _check(description: Mapping[str, Any], path: Path) -> None:
    if description["format"] != FORMAT:
        raise ValueError(f"format {description['format']} is not {FORMAT}")
    if _sha256(path / TENSORS) != description["sha256"]:
        raise ValueError(f"{TENSORS} is not the file that was written")


def save_model(path: Path, tensors: Params, metadata: Mapping[str, str]) -> None:
    """Writes a flat tree of arrays as safetensors, whole or not at all.

    Raises:
        StorageError: The disk is full or refuses; a model that was there before is still there, whole.
        ConfigurationError: safetensors has no such dtype, for instance numpy's complex128.
    """
    temporary = path.with_name(temporary_name(path.name))
    with storing(path):
        try:
            save_tensors(temporary, tensors, metadata)
            temporary.rename(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Params, metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays of one kind as safetensors and makes the file durable; arrays may share memory or have strides."""
    with _as_os_error():
        _writer(tensors)(dict(metadata) if metadata else None, path)
    path.chmod(0o666 & ~_umask())  # the writer makes it readable to its owner alone
    sync_file(path)


def _writer(tensors: Params) -> Callable[[dict[str, str] | None, Path], None]:
    if trees.framework(tensors) == "torch":
        from safetensors.torch import save_file as save_torch

        # Copies, because tied and sliced tensors share memory, which the format refuses.
        copies = {name: array.detach().cpu().contiguous().clone() for name, array in tensors.items()}
        return lambda metadata, path: save_torch(copies, path, metadata)
    from safetensors.numpy import save_file as save_numpy

    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    return lambda metadata, path: save_numpy(arrays, path, metadata)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """The format's writer tells of a full disk in an error of its own, with the number as text."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise ConfigurationError(f"the arrays cannot be saved as safetensors: {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _load_tensors(path: Path, framework: str) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt" if framework == "torch" else "numpy", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
