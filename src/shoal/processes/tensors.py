"""Trees of arrays in anonymous shared memory, in the format of safetensors.

The memory is a file without a name that a socket hands from one process to the next; the system frees it when the last
of them lets go of it. Whoever reads it trusts nothing in it. It is copied, because another process may change it at any
time, unless who wrote it has sealed it, so that the system lets nobody change it any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import mmap
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from shoal.types import Array, Params

CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""The dtypes that both frameworks and safetensors know, and their names in a file."""

NAMES = {code: name for name, code in CODES.items()}

NOT_NUMPYS = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"})

SIZES = {"bool": 1, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}

PREFIX = 8
"""Bytes of the header's length."""

LARGEST_HEADER = 1 << 27
"""Bytes of the largest header to take."""

MFD_CLOEXEC, MFD_ALLOW_SEALING = 1, 2

F_ADD_SEALS, F_GET_SEALS = 1033, 1034

SEALS = 1 | 2 | 4 | 8
"""Of further seals, shrinking, growing and writing. Python has names for them only where its libc had them."""


class Entry(NamedTuple):
    """One array in a file."""

    dtype: str
    """Its dtype, by the frameworks' name."""
    shape: tuple[int, ...]
    start: int
    """Where it begins, in bytes from the first array."""
    end: int
    """Where it ends."""


def write_tensors(tree: Params) -> int:
    """Writes a tree into new shared memory.

    One array at a time is brought to the CPU, so that a model on a device is not there twice.

    Args:
        tree: Arrays of numpy's or torch's, on any device.

    Returns:
        A file descriptor, for the caller to close.

    Raises:
        TypeError: An array's dtype has no place in the format.
        OSError: There is not so much memory.
    """
    entries = plan(tree)
    header = json.dumps(
        {
            name: {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": (entry.start, entry.end)}
            for name, entry in entries.items()
        }
    ).encode()
    header += b" " * (-len(header) % PREFIX)
    fd = anonymous_file("shoal")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(len(header).to_bytes(PREFIX, "little"))
            file.write(header)
            for name in entries:
                file.write(as_bytes(tree[name]).data)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def plan(tree: Params) -> dict[str, Entry]:
    """Returns where the arrays of a tree lie in a file: the widest dtypes first, so that each is aligned to its own.

    Raises:
        TypeError: An array's dtype has no place in the format.
    """
    kinds = {name: dtype_name(array) for name, array in tree.items()}
    for name, kind in kinds.items():
        if kind not in CODES:
            raise TypeError(f"{name} has dtype {kind}, which safetensors does not know")
    entries: dict[str, Entry] = {}
    end = 0
    for name in sorted(tree, key=lambda name: (-size_of(kinds[name]), name)):
        shape = tuple(int(length) for length in tree[name].shape)
        start, end = end, end + math.prod(shape) * size_of(kinds[name])
        entries[name] = Entry(kinds[name], shape, start, end)
    return entries


def seal(fd: int) -> None:
    """Has the system refuse all changes of shared memory from now on; whoever reads it need not copy it then."""
    with contextlib.suppress(OSError):  # an old system: it is copied
        fcntl.fcntl(fd, F_ADD_SEALS, SEALS)


def read_only(fd: int) -> int:
    """Returns a further file descriptor of the same memory, through which nobody can write to it."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


class TensorFile:
    """A tree that another process has written, read as it is asked for.

    Args:
        fd: The file descriptor; it is closed with this object.

    Raises:
        ValueError: The memory does not hold what it should; the file descriptor is closed.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            self._size = os.fstat(fd).st_size
            self.header = self._read_header()
            """The header, as it is in the file."""
            self.entries = entries_of(self.header, self._size - PREFIX - len(self.header))
            """The arrays by name."""
        except OSError as error:
            self.close()
            raise ValueError(f"what should be shared memory cannot be read: {error}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the memory; without effect where that is done."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def nbytes(self) -> int:
        """The size of all arrays together."""
        return self._size - PREFIX - len(self.header)

    def read(self, name: str, *, like: Array | None = None) -> Array:
        """Returns a copy of an array.

        Args:
            name: Which.
            like: An array of the framework to return; None for torch's where numpy has no such dtype, else numpy's.

        Raises:
            ValueError: The shared memory was cut.
        """
        entry = self.entries[name]
        return self._copied(name, entry, np.empty(entry.end - entry.start, np.uint8), like)

    def pieces(self, name: str, size: int, *, memory: np.ndarray, like: Array | None = None) -> Iterator[Array]:
        """Copies an array, flat, so many elements at a time.

        Args:
            name: Which.
            size: The elements of a piece.
            memory: Where each piece is to be in its turn, uint8 [bytes of one or more].
            like: An array of the framework to return; None as for :meth:`read`.

        Raises:
            ValueError: The shared memory was cut, or there is too little for a piece.
        """
        entry = self.entries[name]
        width = size_of(entry.dtype)
        for start in range(entry.start, entry.end, size * width):
            end = min(start + size * width, entry.end)
            yield self._copied(name, Entry(entry.dtype, ((end - start) // width,), start, end), memory, like)

    def _copied(self, name: str, entry: Entry, memory: np.ndarray, like: Array | None) -> Array:
        size = entry.end - entry.start
        if len(memory) < size:
            raise ValueError(f"array {name} has {size} bytes, and the memory for it {len(memory)}")
        data = memory[:size]
        self.fill(data, entry.start)
        kind = "numpy" if like is None or isinstance(like, np.ndarray | np.generic) else "torch"
        return view(data, Entry(entry.dtype, entry.shape, 0, len(data)), framework=kind)

    def fill(self, memory: np.ndarray, start: int) -> None:
        """Copies bytes of the arrays' part into memory, as many as that has.

        Raises:
            ValueError: The memory was cut.
        """
        target, done, first = memory.data, 0, PREFIX + len(self.header) + start
        while done < len(target):
            got = os.preadv(self._fd, [target[done:]], first + done)
            if not got:
                raise ValueError("shared memory was cut while it was read")
            done += got

    def mapped(self) -> np.ndarray | None:
        """Returns the arrays' part, uint8, without a copy; None where somebody could yet change it.

        What is written to it is this process's own.
        """
        try:
            if fcntl.fcntl(self._fd, F_GET_SEALS) & SEALS != SEALS:
                return None
            memory = mmap.mmap(self._fd, self._size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:  # it is no shared memory, but a file; or there is no room for so much
            return None
        return np.frombuffer(memory, np.uint8)[PREFIX + len(self.header) :]

    def _read_header(self) -> bytes:
        length = int.from_bytes(os.pread(self._fd, PREFIX, 0), "little")
        if not 2 <= length <= min(self._size - PREFIX, LARGEST_HEADER):
            raise ValueError(f"shared memory of {self._size} bytes has no header of {length} bytes")
        return os.pread(self._fd, length, PREFIX)


def entries_of(header: bytes, size: int) -> dict[str, Entry]:
    """Returns the arrays that a header tells of.

    Args:
        header: JSON.
        size: Bytes of the arrays.

    Raises:
        ValueError: It is no header, or does not fit.
    """
    try:
        rows = json.loads(header)
        entries = {
            name: Entry(NAMES[row["dtype"]], tuple(map(int, row["shape"])), *map(int, row["data_offsets"]))
            for name, row in rows.items()
            if name != "__metadata__"
        }
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"shared memory has no header of safetensors: {type(error).__name__}: {error}") from error
    for name, entry in entries.items():
        wanted = math.prod(entry.shape) * size_of(entry.dtype)
        if min(entry.shape, default=0) < 0 or entry.start < 0 or entry.end - entry.start != wanted or entry.end > size:
            raise ValueError(f"array {name} of shape {entry.shape} does not fit bytes {entry.start} to {entry.end}")
    return entries


def view(data: np.ndarray, entry: Entry, *, framework: str) -> Array:
    """Returns an array that lies in bytes, without a copy.

    Args:
        data: Shape [bytes], uint8, of one memory with all arrays of a file.
        entry: Where it lies.
        framework: ``numpy`` or ``torch``; numpy's arrays of dtypes that numpy lacks are torch's.
    """
    part = data[entry.start : entry.end]
    if framework == "numpy" and entry.dtype not in NOT_NUMPYS:
        return part.view(entry.dtype).reshape(entry.shape)
    import torch

    if not len(part):  # torch takes no other dtype for no bytes
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    return torch.from_numpy(part).view(getattr(torch, entry.dtype)).reshape(entry.shape)


def anonymous_file(name: str) -> int:
    """Returns the file descriptor of a new file that is in memory alone.

    Args:
        name: Shown in the process table's list of open files.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)
    # Many builds of Python were made with a libc that lacks it, and run with one that has it.
    fd: int = ctypes.CDLL(None, use_errno=True).memfd_create(name.encode(), MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def as_bytes(array: Array) -> np.ndarray:
    """Returns the elements of an array as bytes, on the CPU."""
    if isinstance(array, np.ndarray | np.generic):
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    import torch

    if not array.numel():  # of which torch takes some for not contiguous
        return np.empty(0, np.uint8)
    flat = array.detach().cpu().contiguous().reshape(-1)
    found: np.ndarray = flat.view(torch.uint8).numpy()
    return found


def dtype_name(array: Any) -> str:
    """Returns an array's dtype, by the frameworks' name."""
    return str(array.dtype).removeprefix("torch.")


def size_of(dtype: str) -> int:
    """Returns the bytes of one element of a dtype that is in :data:`CODES`."""
    return SIZES.get(dtype) or np.dtype(dtype).itemsize
