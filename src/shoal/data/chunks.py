"""Going over large arrays piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

CHUNK_BYTES = 16 * 2**20
"""How much of an array is looked at at once, so that a memory-mapped one is never in memory as a whole."""


def chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields an array's rows in chunks of bounded size, each with the index of its first row."""
    row = max(array.nbytes // max(len(array), 1), 1)
    step = max(CHUNK_BYTES // row, 1)
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def digest(*arrays: np.ndarray) -> str:
    """Returns a SHA-256 over dtypes, shapes and elements, as 16 hexadecimal digits."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype.str} {array.shape}".encode())
        for _, chunk in chunks(np.atleast_1d(array)):
            total.update(np.ascontiguousarray(chunk).tobytes())
    return total.hexdigest()[:16]
