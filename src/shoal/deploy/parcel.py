"""What travels between the server and a site: JSON and tensors of any dtype, as raw bytes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from shoal.processes.tensors import (
    CODES,
    PREFIX,
    Entry,
    TensorFile,
    anonymous_file,
    as_bytes,
    dtype_name,
    seal,
    size_of,
    view,
)
from shoal.types import Array, Params

META = "shoal"
"""Under which a parcel's JSON is in the metadata of its file."""

METADATA = "__metadata__"
"""Under which safetensors keeps that; no array may be called so."""


@dataclass(frozen=True, eq=False)
class RawTensor:
    """An array as bytes, of a dtype that numpy need not know."""

    dtype: str
    """By the frameworks' name, such as ``bfloat16``."""
    shape: tuple[int, ...]
    data: bytes | memoryview
    """The elements in C order, little-endian."""

    def __post_init__(self) -> None:
        if self.dtype not in CODES:
            raise ValueError(f"dtype {self.dtype!r:.40} is not one that can be sent")
        if min(self.shape, default=0) < 0 or len(self.data) != math.prod(self.shape) * size_of(self.dtype):
            raise ValueError(f"a tensor of {self.dtype} {list(self.shape)} does not have {len(self.data)} bytes")


@dataclass(frozen=True, kw_only=True, eq=False)
class Parcel:
    """One message."""

    meta: Mapping[str, Any]
    """JSON."""
    tensors: Mapping[str, RawTensor] = field(default_factory=dict)
    """By name."""

    @property
    def nbytes(self) -> int:
        """The size of all tensors together."""
        return sum(len(tensor.data) for tensor in self.tensors.values())


def raw(array: Array) -> RawTensor:
    """Returns an array of numpy's or torch's, on any device, as bytes.

    Raises:
        ValueError: Its dtype cannot be sent.
    """
    shape = tuple(int(length) for length in array.shape)
    return RawTensor(dtype_name(array), shape, as_bytes(array).data)


def array_of(tensor: RawTensor, *, framework: str) -> Array:
    """Returns a tensor as an array, without a copy if its bytes may be written to.

    Args:
        tensor: The bytes.
        framework: ``numpy`` or ``torch``; numpy's arrays of dtypes that numpy lacks are torch's.
    """
    data = np.frombuffer(tensor.data, np.uint8)
    if not data.flags.writeable and framework == "torch":
        data = data.copy()  # torch has no arrays that are only to be read
    return view(data, Entry(tensor.dtype, tensor.shape, 0, len(data)), framework=framework)


def raw_tree(tree: Params) -> dict[str, RawTensor]:
    """Returns the arrays of a tree as bytes."""
    return {name: raw(array) for name, array in tree.items()}


def write_parcel(parcel: Parcel) -> int:
    """Writes a parcel into new shared memory, in the format of safetensors.

    Returns:
        A file descriptor, for the caller to close.

    Raises:
        OSError: There is not so much memory.
    """
    fd = anonymous_file("shoal")
    try:
        with open(fd, "wb", closefd=False) as file:
            write_parcel_to(parcel, file)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_parcel_to(parcel: Parcel, file: IO[bytes]) -> None:
    """Writes a parcel into a file, in the format of safetensors.

    Raises:
        OSError: There is no room.
        ValueError: A name is one that the format keeps for itself.
    """
    if METADATA in parcel.tensors:
        raise ValueError(f"no array may be called {METADATA}")
    rows: dict[str, Any] = {METADATA: {META: json.dumps(dict(parcel.meta))}}
    end = 0
    order = sorted(parcel.tensors, key=lambda name: (-size_of(parcel.tensors[name].dtype), name))
    for name in order:
        tensor = parcel.tensors[name]
        start, end = end, end + len(tensor.data)
        rows[name] = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, end)}
    header = json.dumps(rows).encode()
    header += b" " * (-len(header) % PREFIX)
    file.write(len(header).to_bytes(PREFIX, "little"))
    file.write(header)
    for name in order:
        file.write(parcel.tensors[name].data)


def read_parcel(fd: int) -> Parcel:
    """Returns the parcel that another process has written; closes the file descriptor.

    Nobody can change it meanwhile: it is sealed, or copied.

    Raises:
        ValueError: The memory does not hold one.
    """
    with TensorFile(fd) as file:
        rows = json.loads(file.header)
        try:
            meta = json.loads(rows[METADATA][META])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a parcel has no meta data: {type(error).__name__}") from error
        if type(meta) is not dict:
            raise ValueError("a parcel's meta data must be a JSON object")
        return Parcel(meta=meta, tensors=tensors_in(file))


def tensors_in(file: TensorFile) -> dict[str, RawTensor]:
    """Returns the arrays of a file, which may then be closed: without a copy, where nobody can change it.

    Raises:
        ValueError: They overlap.
    """
    told = sum(entry.end - entry.start for entry in file.entries.values())
    if told > file.nbytes:  # the same bytes many times would be more in memory than whoever sent them had
        raise ValueError(f"a parcel's arrays overlap: they are {told} bytes, and it has {file.nbytes}")
    memory = file.mapped()
    tensors = {}
    for name, entry in file.entries.items():
        aligned = (PREFIX + len(file.header) + entry.start) % size_of(entry.dtype) == 0
        if memory is not None and aligned:
            data = memory[entry.start : entry.end]
        else:
            data = np.empty(entry.end - entry.start, np.uint8)
            file.fill(data, entry.start)
        tensors[name] = RawTensor(entry.dtype, entry.shape, data.data)
    return tensors
