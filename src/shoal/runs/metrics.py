"""``metrics.jsonl``: one JSON object a round, or an epoch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shoal.runs.files import storing, sync_folder, write_atomic

UNITS = ("round", "epoch")
"""What records are numbered by."""

TIME_KEYS = frozenset({"seconds", "site_seconds", "clients_per_second", "samples_per_second", "elapsed"})
"""The keys whose values are measured times."""

USAGE_KEYS = frozenset({"memory_bytes", "utilization"})
"""The keys that say what of the machine was used. Two equal runs agree in all but these and the times."""

BOOKKEEPING = TIME_KEYS | {
    *UNITS,
    "step",
    "learning_rate",
    "memory_bytes",
    "utilization",
    "clients",
    "failed",
    "examples",
    "bytes_up",
    "bytes_down",
}
"""Keys of a record that are no metric of a model."""


class MetricsLog:
    """Appends records to a file; each is durable before :meth:`append` returns.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record as a line. JSON has no NaN and no infinity: they are written as null.

        Raises:
            StorageError: The file cannot be written.
        """
        line = json.dumps(_finite(record), allow_nan=False)
        with storing(self._path), self._path.open("ab") as stream:
            start = stream.tell()
            try:
                stream.write(line.encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
                if start == 0:
                    sync_folder(self._path.parent)  # the file itself is new
            except OSError:
                os.ftruncate(stream.fileno(), start)  # no half of a line stays
                raise

    def truncate(self, last: int) -> None:
        """Removes the records of later rounds or epochs, and a last line that a crash has torn."""
        if not self._path.exists():
            return
        lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (record := parsed(line)) is not None and number(record) <= last]
        if kept != lines:
            write_atomic(self._path, b"".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file, without a last line that a crash has torn; none where there is no file."""
    if not path.exists():
        return []
    records = (parsed(line) for line in path.read_bytes().splitlines(keepends=True))
    return [record for record in records if record is not None]


def parsed(line: bytes) -> dict[str, Any] | None:
    """Returns a line's record; None if a crash has torn it."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no text: a power cut may leave any bytes
        return None
    return record if isinstance(record, dict) and any(name in record for name in UNITS) else None


def unit(record: Mapping[str, Any]) -> str:
    """Returns what a record is numbered by."""
    return next(name for name in UNITS if name in record)


def number(record: Mapping[str, Any]) -> int:
    """Returns the round or epoch of a record."""
    return int(record[unit(record)])


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns a record's numbers by name, those of its sites as ``site-1/loss``; null was not finite, and is NaN."""
    found = dict(record)
    for site, metrics in found.pop("sites", {}).items():
        found |= {f"{site}/{name}": value for name, value in metrics.items()}
    found |= {f"{site}/seconds": value for site, value in found.pop("site_seconds", {}).items()}
    numbers = ((name, math.nan if value is None else value) for name, value in found.items())
    return {name: float(value) for name, value in numbers if isinstance(value, int | float)}


def held_out_metrics(record: Mapping[str, Any]) -> list[str]:
    """Returns the names of a record's metrics on held-out data, accuracy first."""
    return in_order(
        name
        for name, value in record.items()
        if name not in BOOKKEEPING and not name.startswith(("train_", "client_")) and isinstance(value, int | float)
    )


def in_order(names: Iterable[str]) -> list[str]:
    """Returns each name once: accuracy, then others, then the loss."""
    return sorted(set(names), key=lambda name: (name != "accuracy", name == "loss", name))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
