from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from process_table import open_files
from shoal.deploy.parcel import (
    META,
    METADATA,
    Parcel,
    RawTensor,
    array_of,
    raw,
    raw_tree,
    read_parcel,
    write_parcel,
    write_parcel_to,
)
from shoal.deploy.spool import spooled
from shoal.processes.tensors import CODES, NOT_NUMPYS, anonymous_file, size_of

KINDS = sorted(CODES)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.text(min_size=1, max_size=8).filter(lambda name: name != METADATA)


@st.composite
def tensors(draw):
    """Any bytes at all, those of NaN too, of any dtype and shape."""
    dtype = draw(st.sampled_from(KINDS))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = math.prod(shape) * size_of(dtype)
    return RawTensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


parcels = st.builds(
    Parcel,
    meta=st.dictionaries(st.text(max_size=8), json_values, max_size=4),
    tensors=st.dictionaries(names, tensors(), max_size=4),
)


def same(parcel, other):
    assert parcel.meta == other.meta
    assert parcel.tensors.keys() == other.tensors.keys()
    for name, tensor in parcel.tensors.items():
        found = other.tensors[name]
        assert (found.dtype, found.shape, bytes(found.data)) == (tensor.dtype, tensor.shape, bytes(tensor.data))


@given(parcels)
def test_what_is_written_is_read(parcel):
    before = open_files()
    found = read_parcel(write_parcel(parcel))
    same(parcel, found)
    assert found.nbytes == parcel.nbytes
    del found
    assert open_files() == before


def unsealed(parcel):
    fd = anonymous_file("test")
    with open(fd, "wb", closefd=False) as file:
        write_parcel_to(parcel, file)
    return fd


@given(parcels)
def test_what_nobody_has_sealed_is_copied(parcel):
    fd = unsealed(parcel)
    size = os.fstat(fd).st_size
    found = read_parcel(os.dup(fd))
    os.pwrite(fd, b"\xff" * size, 0)
    os.ftruncate(fd, 0)
    os.close(fd)
    same(parcel, found)


def test_what_is_written_can_be_changed_by_nobody_and_what_is_read_belongs_to_its_reader():
    parcel = Parcel(meta={}, tensors=raw_tree({"w": np.arange(4, dtype=np.float32)}))
    fd = write_parcel(parcel)
    for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 20)):
        with pytest.raises(PermissionError):
            change()
    first, second = read_parcel(os.dup(fd)), read_parcel(fd)
    own = array_of(first.tensors["w"], framework="torch")
    own += 1
    assert own.tolist() == [1, 2, 3, 4]
    same(parcel, second)


@given(parcels)
def test_what_waits_on_disk_is_read_too(parcel):
    before = open_files()
    with spooled(parcel) as file:
        assert file.entries.keys() == parcel.tensors.keys()
        for name, tensor in parcel.tensors.items():
            assert raw(file.read(name)).data == tensor.data
    assert open_files() == before


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_become_bytes_and_arrays_again(kind, shape, framework):
    if framework == "numpy" and kind in NOT_NUMPYS:
        pytest.skip("numpy has no such dtype")
    rng = np.random.default_rng(0)
    if framework == "numpy":
        array = np.asarray(rng.integers(0, 2, size=shape)).astype(kind)
    else:
        array = torch.from_numpy(np.asarray(rng.integers(0, 2, size=shape, dtype=np.int64))).to(getattr(torch, kind))
    tensor = raw(array)
    assert (tensor.dtype, tensor.shape) == (kind, shape)
    found = array_of(RawTensor(kind, shape, bytes(tensor.data)), framework=framework)  # of what is only to be read
    assert type(found) is type(array) or not shape
    assert str(found.dtype).removeprefix("torch.") == kind
    assert tuple(found.shape) == shape
    assert bytes(raw(found).data) == bytes(tensor.data)


def test_what_is_not_contiguous_is_sent_in_its_own_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    tree = raw_tree({"a": array, "b": torch.from_numpy(array)})
    wanted = np.ascontiguousarray(array).tobytes()
    assert bytes(tree["a"].data) == bytes(tree["b"].data) == wanted


def test_what_cannot_be_sent_is_refused():
    for array in (np.zeros(2, complex), np.zeros(2, ">f4"), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="cannot be sent|can be sent"):
            raw(array)
    with pytest.raises(ValueError, match="does not have 3 bytes"):
        RawTensor("float32", (1,), b"abc")
    with pytest.raises(ValueError, match="does not have"):
        RawTensor("uint8", (-1, -1), b"a")
    before = open_files()
    with pytest.raises(ValueError, match="no array may be called __metadata__"):
        write_parcel(Parcel(meta={}, tensors={METADATA: RawTensor("uint8", (1,), b"a")}))
    assert open_files() == before


def file_of(data):
    fd = anonymous_file("test")
    os.write(fd, data)
    return fd


def with_header(rows, arrays=b""):
    header = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    return len(header).to_bytes(8, "little") + header + arrays


GOOD = {METADATA: {META: "{}"}}

WRONG = {
    "nothing": b"",
    "short": b"\1\2",
    "no header": b"\xff" * 8,
    "half a header": with_header(GOOD)[:-3],
    "no JSON": with_header(b"what?"),
    "a list": with_header([]),
    "too deep": with_header(b"[" * 100_000),
    "no meta": with_header({}),
    "meta of another kind": with_header({METADATA: [1]}),
    "meta that is no JSON": with_header({METADATA: {META: "{"}}),
    "meta that is too deep": with_header({METADATA: {META: "[" * 100_000}}),
    "meta that is no object": with_header({METADATA: {META: "[]"}}),
    "meta that is no text": with_header({METADATA: {META: {}}}),
    "a dtype that is none": with_header({**GOOD, "a": {"dtype": "C64", "shape": [0], "data_offsets": [0, 0]}}),
    "an endless shape": with_header({**GOOD, "a": {"dtype": "U8", "shape": [float("inf")], "data_offsets": [0, 0]}}),
    "a shape of NaN": with_header({**GOOD, "a": {"dtype": "U8", "shape": [float("nan")], "data_offsets": [0, 0]}}),
    "a negative shape": with_header({**GOOD, "a": {"dtype": "U8", "shape": [-1, -1], "data_offsets": [0, 1]}}, b"a"),
    "a shape that lies": with_header({**GOOD, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"abcd"),
    "beyond the end": with_header({**GOOD, "a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, b"abcd"),
    "before the start": with_header({**GOOD, "a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, b"abcd"),
    "three offsets": with_header({**GOOD, "a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0, 0]}}),
    "a row that is none": with_header({**GOOD, "a": 3}),
    "the same bytes twice": with_header(
        {**GOOD, **{name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"}}, b"abcd"
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_files_that_lie_are_refused_and_closed(kind):
    before = open_files()
    with pytest.raises(ValueError):
        read_parcel(file_of(WRONG[kind]))
    assert open_files() == before


@given(st.binary(max_size=200) | st.binary(max_size=60).map(with_header))
def test_garbage_is_refused_and_closed(data):
    before = open_files()
    with pytest.raises(ValueError):
        read_parcel(file_of(data))
    assert open_files() == before


@given(parcels, st.data())
def test_a_file_that_is_cut_is_refused(parcel, data):
    before = open_files()
    fd = unsealed(parcel)
    size = os.fstat(fd).st_size
    cut = data.draw(st.integers(0, size - 1))
    os.ftruncate(fd, cut)
    try:
        found = read_parcel(fd)
    except ValueError:
        assert open_files() == before
    else:  # of the padding alone was something missing: impossible, the header says its length
        raise AssertionError(found)


def test_what_is_no_file_is_refused():
    before = open_files()
    out, into = os.pipe()
    with pytest.raises(ValueError):
        read_parcel(out)
    os.close(into)
    assert open_files() == before
