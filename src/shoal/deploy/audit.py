"""A site's record of what it was sent and what it sent: one line for each task."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from shoal.deploy.parcel import RawTensor
from shoal.runs.files import storing

AUDIT = "audit.jsonl"
"""The file in a site's folder."""

PIECE = 1 << 20
"""Elements of which a norm is computed at a time."""


class AuditLog:
    """Appends lines to a site's record.

    Args:
        folder: The site's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / AUDIT
        self._lock = threading.Lock()

    def write(self, told: Mapping[str, Any]) -> None:
        """Writes a line, with the time.

        Raises:
            StorageError: It cannot be written.
        """
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **told}) + "\n"
        with storing(self.path), self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)


def summary(tensors: Mapping[str, RawTensor]) -> dict[str, Any]:
    """Returns what is recorded of arrays: names, dtypes, shapes, norms and SHA-256, never a value."""
    return {
        "bytes": sum(len(tensor.data) for tensor in tensors.values()),
        "arrays": {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "norm": norm(tensor),
                "sha256": hashlib.sha256(tensor.data).hexdigest(),
            }
            for name, tensor in sorted(tensors.items())
        },
    }


def norm(tensor: RawTensor) -> float | None:
    """Returns the Euclidean norm of an array; None where that is not finite, or of float8."""
    if tensor.dtype.startswith("float8"):
        return None
    plain = "uint16" if tensor.dtype == "bfloat16" else tensor.dtype
    flat = np.frombuffer(tensor.data, plain)
    total = 0.0
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE]
        if tensor.dtype == "bfloat16":  # the upper half of a float32
            piece = (piece.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told as None
            wide = piece.astype(np.float64)
            total += float(wide @ wide)
    return math.sqrt(total) if math.isfinite(total) else None
