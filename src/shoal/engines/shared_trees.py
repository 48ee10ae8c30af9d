"""Trees of arrays in memory that processes share, without a name in any file system.

The memory is an anonymous file that a socket hands from one process to the next. The system frees it when the last of
them lets go of it, however that one ends. It holds eight bytes with the length of a JSON header, the header, and the
arrays' bytes in C order, each array from a multiple of 64 on.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from shoal.processes.tensors import anonymous_file
from shoal.types import Array, Params

PREFIX = 8
"""Bytes of the header's length."""

ALIGNMENT = 64
"""Where arrays begin: as aligned as the frameworks' own memory, so that kernels run as they would there."""


class _Entry(NamedTuple):
    """One array in the header."""

    tree: str
    name: str
    framework: str
    dtype: str
    device: str
    shape: tuple[int, ...]
    start: int
    """Offset in bytes from the first array."""


def write_shared(meta: Mapping[str, Any], trees: Mapping[str, Params]) -> int:
    """Writes trees into new shared memory.

    Args:
        meta: Whatever else is to be told, as JSON.
        trees: Arrays of numpy's or torch's, on any device; kind, dtype, shape and device come back with them.

    Returns:
        A file descriptor, for the caller to close.

    Raises:
        TypeError: An array holds Python objects, or what its dtype's name does not tell.
        OSError: There is not so much memory.
    """
    entries: list[_Entry] = []
    parts: list[np.ndarray] = []
    end = 0
    for tree, arrays in trees.items():
        for name, array in arrays.items():
            framework, dtype, device, data = _as_bytes(array, f"{tree} {name}")
            entries.append(_Entry(tree, name, framework, dtype, device, tuple(array.shape), _aligned(end)))
            end = _aligned(end) + data.nbytes
            parts.append(data)
    header = json.dumps({"meta": meta, "arrays": entries}).encode()
    fd = anonymous_file("shoal")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(len(header).to_bytes(PREFIX, "little"))
            file.write(header)
            first = _aligned(PREFIX + len(header))
            for entry, data in zip(entries, parts, strict=True):
                file.seek(first + entry.start)
                file.write(data.data)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_shared(fd: int, *, copy: bool) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
    """Reads what :func:`write_shared` wrote.

    Args:
        fd: The file descriptor; it may be closed afterwards.
        copy: Whether the arrays shall be this process's own memory. Else they are the shared memory until they are
            written to, and hold a file open.

    Returns:
        The caller's JSON, and the trees that hold an array.

    Raises:
        ValueError: The memory does not hold what it should.
    """
    size = os.fstat(fd).st_size
    if size < PREFIX:
        raise ValueError(f"shared memory of {size} bytes has no header")
    memory = _copied(fd, size) if copy else memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_COPY))
    length = int.from_bytes(memory[:PREFIX], "little")
    if PREFIX + length > size:
        raise ValueError(f"the header of shared memory has {length} bytes, of which {size - PREFIX} are there")
    header = json.loads(bytes(memory[PREFIX : PREFIX + length]))
    first = _aligned(PREFIX + length)
    trees: dict[str, dict[str, Array]] = {}
    for row in header["arrays"]:
        entry = _Entry(*row)
        trees.setdefault(entry.tree, {})[entry.name] = _from_memory(memory, entry, first + entry.start)
    return header["meta"], trees


def _copied(fd: int, size: int) -> memoryview:
    memory = np.empty(size, np.uint8).data
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        if file.readinto(memory) != size:
            raise ValueError("shared memory was cut while it was read")
    return memory


def _as_bytes(array: Array, what: str) -> tuple[str, str, str, np.ndarray]:
    """Returns the framework, dtype and device of an array, and its elements as bytes."""
    if isinstance(array, np.ndarray | np.generic):
        dtype = array.dtype
        if dtype.hasobject or np.dtype(dtype.str) != dtype:
            raise TypeError(f"{what}: numpy arrays of {dtype} cannot be handed to another process")
        return "numpy", dtype.str, "cpu", np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    import torch

    if not isinstance(array, torch.Tensor):
        raise TypeError(f"{what}: {type(array).__name__} is neither a numpy array nor a torch tensor")
    flat = array.detach().cpu().contiguous().reshape(-1)
    return "torch", str(array.dtype).removeprefix("torch."), str(array.device), flat.view(torch.uint8).numpy()


def _from_memory(memory: memoryview, entry: _Entry, start: int) -> Array:
    count = math.prod(entry.shape)
    if entry.framework == "numpy":
        array = np.frombuffer(memory, np.dtype(entry.dtype), count, start) if count else np.empty(0, entry.dtype)
        return array.reshape(entry.shape)
    import torch

    dtype = getattr(torch, entry.dtype)
    tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
    return tensor.reshape(entry.shape).to(entry.device)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
