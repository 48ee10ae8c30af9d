from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import numpy as files_of_numpy
from safetensors import torch as files_of_torch

from process_table import open_files
from shoal.processes.tensors import CODES, TensorFile, anonymous_file, plan, read_only, view, write_tensors

OF_TORCH = sorted(CODES)
OF_NUMPY = [name for name in OF_TORCH if name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2")]

names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
kinds = st.lists(st.tuples(st.sampled_from(OF_TORCH), shapes), max_size=6)


def of_bytes(rng, dtype, shape):
    """Returns a tensor with any bits at all, those of NaN too."""
    size = int(np.prod(shape)) * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    raw = rng.integers(2 if dtype == "bool" else 256, size=size, dtype=np.uint8)
    if not size:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape)


def raw(array):
    """Returns an array's bytes."""
    if isinstance(array, torch.Tensor):
        return array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(array).tobytes()


def contents(fd):
    """Returns all bytes of a file, and lets go of it."""
    with open(fd, "rb") as file:  # noqa: PTH123
        file.seek(0)
        return file.read()


def file_of(data):
    """Returns a file in memory that holds these bytes."""
    fd = anonymous_file("test")
    os.write(fd, data)
    return fd


def with_header(header, arrays=b"", *, length=None):
    """Returns the bytes of a file with a header."""
    said = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(said) if length is None else length).to_bytes(8, "little") + said + arrays


@given(st.dictionaries(names, st.tuples(st.sampled_from(OF_TORCH), shapes), max_size=6), st.integers(0, 9))
def test_every_bit_of_a_tensor_comes_back(rows, seed):
    rng = np.random.default_rng(seed)
    tree = {name: of_bytes(rng, dtype, shape) for name, (dtype, shape) in rows.items()}
    with TensorFile(write_tensors(tree)) as file:
        assert file.entries.keys() == tree.keys()
        assert file.nbytes == sum(tensor.nbytes for tensor in tree.values())
        for name, sent in tree.items():
            tensor = file.read(name, like=sent)
            assert (tensor.dtype, tensor.shape) == (sent.dtype, sent.shape)
            assert raw(tensor) == raw(sent)
            memory = np.empty(sent.nbytes, np.uint8)
            pieces = [raw(piece) for piece in file.pieces(name, seed + 1, memory=memory, like=sent)]
            assert b"".join(pieces) == raw(sent)


@given(st.dictionaries(names, st.tuples(st.sampled_from(OF_NUMPY), shapes), max_size=6), st.integers(0, 9))
def test_every_bit_of_an_array_comes_back(rows, seed):
    rng = np.random.default_rng(seed)
    tree = {name: of_bytes(rng, dtype, shape).numpy() for name, (dtype, shape) in rows.items()}
    with TensorFile(write_tensors(tree)) as file:
        for name, array in tree.items():
            found = file.read(name)
            assert isinstance(found, np.ndarray)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert raw(found) == raw(array)


@given(kinds, st.integers(0, 9))
def test_the_bytes_are_those_of_the_library(rows, seed):
    rng = np.random.default_rng(seed)
    tree = {f"n{index}": of_bytes(rng, dtype, shape) for index, (dtype, shape) in enumerate(rows)}
    loaded = files_of_torch.load(contents(write_tensors(tree)))
    assert loaded.keys() == tree.keys()
    for name, tensor in tree.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(loaded[name]) == raw(tensor)
    with TensorFile(file_of(files_of_torch.save(tree, {"made": "elsewhere"}))) as file:
        assert {name: raw(file.read(name, like=tensor)) for name, tensor in tree.items()} == {
            name: raw(tensor) for name, tensor in tree.items()
        }


def test_numpys_library_reads_them_too():
    tree = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.float64(1.5), "c": np.zeros((0, 3), np.float32)}
    loaded = files_of_numpy.load(contents(write_tensors(tree)))
    for name, array in tree.items():
        assert raw(loaded[name]) == raw(array)


@given(kinds)
def test_each_array_is_aligned_to_its_dtype(rows):
    tree = {f"n{index}": torch.empty(shape, dtype=getattr(torch, dtype)) for index, (dtype, shape) in enumerate(rows)}
    entries = plan(tree)
    assert all(entry.start % tree[name].element_size() == 0 for name, entry in entries.items())
    lengths = [entry.end - entry.start for entry in entries.values()]
    assert max((entry.end for entry in entries.values()), default=0) == sum(lengths)


def test_arrays_need_not_be_contiguous():
    array = np.arange(12.0).reshape(3, 4)
    tree = {"numpy": array.T, "torch": torch.from_numpy(array).T, "parameter": torch.nn.Parameter(torch.ones(2))}
    with TensorFile(write_tensors(tree)) as file:
        np.testing.assert_array_equal(file.read("numpy"), array.T)
        np.testing.assert_array_equal(file.read("torch"), array.T)
        assert not file.read("parameter", like=tree["parameter"]).requires_grad


def test_what_numpy_lacks_is_torchs():
    with TensorFile(write_tensors({"w": torch.ones(2, dtype=torch.bfloat16)})) as file:
        assert file.read("w").dtype == torch.bfloat16


@pytest.mark.parametrize("array", [np.zeros(2, np.complex64), np.array(["text"]), torch.zeros(2) * 1j])
def test_a_dtype_without_a_place_is_refused(array):
    before = open_files()
    with pytest.raises(TypeError, match="^w has dtype .*, which safetensors does not know"):
        write_tensors({"w": array})
    assert open_files() == before


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    """Returns a header of one array."""
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


LIES = {
    "nothing": b"",
    "a short length": b"\x04\0\0",
    "no header": with_header(b"", length=0),
    "a header of 2^60 bytes": with_header(entry(), bytes(8), length=2**60),
    "a negative length": with_header(entry(), bytes(8), length=2**64 - 1),
    "a header longer than the file": with_header(entry(), length=500),
    "no JSON": with_header(b"\xff\xfe{]"),
    "no object": with_header([1, 2]),
    "a number": with_header(b"17"),
    "deep JSON": with_header(b"[" * 100_000 + b"]" * 100_000),
    "an array that is none": with_header({"w": 3}, bytes(8)),
    "another dtype": with_header(entry("C64"), bytes(8)),
    "no offsets": with_header({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "one offset": with_header(entry(offsets=(0,)), bytes(8)),
    "offsets in words": with_header(entry(offsets=("a", "b")), bytes(8)),
    "offsets beyond the end": with_header(entry(offsets=(8, 16)), bytes(8)),
    "offsets that begin before": with_header(entry(offsets=(-8, 0)), bytes(8)),
    "offsets in reverse": with_header(entry(offsets=(8, 0)), bytes(8)),
    "more offsets than the shape": with_header(entry(offsets=(0, 4)), bytes(8)),
    "a huge shape": with_header(entry(shape=(2**40, 2**40)), bytes(8)),
    "a negative shape": with_header(entry(shape=(-1, -2)), bytes(8)),
    "a shape in words": with_header(entry(shape=("two",)), bytes(8)),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_file_that_lies_is_refused(kind):
    before = open_files()
    with pytest.raises(ValueError):
        TensorFile(file_of(LIES[kind]))
    assert open_files() == before


@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_refused_or_read_within_its_bounds(data, headed):
    try:
        with TensorFile(file_of(with_header(data) if headed else data)) as file:
            assert sum(len(raw(file.read(name))) for name in file.entries) <= len(data) * max(1, len(file.entries))
    except ValueError:
        return


@given(st.integers(0, 200))
def test_a_file_that_was_cut_is_refused(length):
    whole = contents(write_tensors({"a": np.arange(10.0), "b": np.ones((3, 2), np.int8)}))
    if length < len(whole):
        with pytest.raises(ValueError):
            TensorFile(file_of(whole[:length]))


def test_a_file_that_is_cut_while_it_is_read_is_told():
    sealed, fd = write_tensors({"w": np.arange(1000.0)}), anonymous_file("test")
    os.write(fd, os.pread(sealed, 1 << 20, 0))
    os.close(sealed)
    with TensorFile(os.dup(fd)) as file:
        os.ftruncate(fd, 500)
        with pytest.raises(ValueError, match="cut while it was read"):
            file.read("w")
    os.close(fd)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
@given(length=st.integers(0, 20), size=st.integers(1, 25))
def test_pieces_of_an_array_are_the_array(dtype, length, size):
    tree = {"before": torch.ones(3), "w": (torch.arange(length) - 7).to(getattr(torch, dtype))}
    with TensorFile(write_tensors(tree)) as file:
        memory = np.empty(8 * size, np.uint8)
        pieces = [piece.clone() for piece in file.pieces("w", size, memory=memory, like=tree["w"])]
    assert [len(piece) for piece in pieces] == [min(size, length - start) for start in range(0, length, size)]
    assert all(piece.dtype == tree["w"].dtype for piece in pieces)
    assert torch.equal(torch.cat([*pieces, tree["w"][:0]]).double(), tree["w"].double())


@pytest.mark.parametrize("given", [0, 23])
def test_too_little_memory_for_a_copy_is_told(given):
    with (
        TensorFile(write_tensors({"w": np.arange(3.0)})) as file,
        pytest.raises(ValueError, match=f"array w has 24 bytes, and the memory for it {given}"),
    ):
        next(file.pieces("w", 3, memory=np.empty(given, np.uint8)))


def test_nobody_writes_through_what_is_for_reading():
    fd = write_tensors({"w": np.arange(3.0)})
    reading = read_only(fd)
    with pytest.raises(OSError):
        os.write(reading, b"x")
    os.close(fd)
    with TensorFile(reading) as file:
        np.testing.assert_array_equal(file.read("w"), np.arange(3.0))


def test_what_is_read_is_a_copy_and_may_be_written():
    with TensorFile(write_tensors({"w": np.arange(3.0)})) as file:
        file.read("w")[:] = 7
        np.testing.assert_array_equal(file.read("w"), np.arange(3.0))


def test_a_view_lies_in_the_bytes():
    data = np.zeros(16, np.uint8)
    entries = plan({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float64)})
    for name, framework in (("a", "numpy"), ("b", "torch")):
        view(data, entries[name], framework=framework)[...] = 1
    assert data.view(np.float64)[0] == 1
    assert data[8:].view(np.float32).tolist() == [1, 1]
