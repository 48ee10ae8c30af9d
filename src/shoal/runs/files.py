"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file under a temporary name, makes it durable, and gives it its name.

    Raises:
        StorageError: The disk is full or refuses; what had the name before is still there, whole.
    """
    temporary = path.with_name(temporary_name(path.name))
    with storing(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """Returns the name that a file has in its folder until it is whole; a killed process leaves it there."""
    return f".{name}.tmp"


def write_json(path: Path, content: Any) -> None:
    """Writes an object as indented JSON; see :func:`write_atomic`."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def is_taken(folder: Path) -> bool:
    """Tells whether there is something in the place of a new folder; an empty one is none."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def sync_file(path: Path) -> None:
    """Makes a file's content durable."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Makes a folder's entries durable: without it a rename may be lost in a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to write into one line that says what and why."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} could not be written: {_reason(error)}; earlier files are whole") from error


def require_space(folder: Path, needed: int) -> None:
    """Makes sure that there is room for ``needed`` bytes in a folder, which need not exist yet.

    Raises:
        StorageError: There is less.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{folder} needs {_size(needed)} for its checkpoints, and its disk has {_size(free)} free: "
            "make room, or choose another run folder"
        )


def _reason(error: OSError) -> str:
    if error.errno in FULL:
        return f"the disk is full ({error.strerror})"
    return error.strerror or str(error)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
