"""Reading arrays from pickles that others wrote, without running what such a file may name."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

Names = Mapping[tuple[str, str], Any]
"""What a pickle may name: by module and name, the harmless thing to put in its place."""


def unpickle(stream: BinaryIO, *, admitted: Names | None = None, encoding: str = "ASCII") -> Any:
    """Returns what a pickle holds, if that is plain Python values and numpy's arrays.

    Args:
        stream: The pickle.
        admitted: What else it may name.
        encoding: How Python 2 wrote its strings; "bytes" leaves them undecoded.

    Raises:
        pickle.UnpicklingError: The pickle names anything else.
        Exception: It is damaged, which may show in any way.
    """
    return _Unpickler(stream, admitted or {}, encoding).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, admitted: Names, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)
        self._admitted = {**_ARRAYS, **admitted}

    def find_class(self, module: str, name: str) -> Any:
        key = (module.replace("numpy._core", "numpy.core"), name)
        if key not in self._admitted:
            raise pickle.UnpicklingError(f"{module}.{name} has no place among arrays")
        return self._admitted[key]


def _reconstruct(kind: type, shape: tuple[int, ...], typecode: Any) -> np.ndarray:
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"{kind} is no array")
    return np.empty(shape, dtype=np.dtype(typecode))


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


_ARRAYS: Names = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}
