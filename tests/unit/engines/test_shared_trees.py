from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from process_table import open_files
from shoal.engines.shared_trees import read_shared, write_shared

TORCH = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
]

names = st.text(max_size=8)
shapes = st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
numpy_arrays = st_numpy.arrays(
    st.one_of(
        st_numpy.boolean_dtypes(),
        st_numpy.integer_dtypes(endianness="?"),
        st_numpy.floating_dtypes(endianness="?"),
        st_numpy.complex_number_dtypes(),
        st_numpy.unicode_string_dtypes(max_len=3),
    ),
    shapes,
)


@st.composite
def tensors(draw):
    shape, dtype = draw(shapes), draw(st.sampled_from(TORCH))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        data = bytes(byte % 2 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


trees = st.dictionaries(names, st.one_of(numpy_arrays, tensors(), tensors().map(lambda t: t.mT if t.ndim > 1 else t)))


def through(meta, given, *, copy=True):
    fd = write_shared(meta, given)
    try:
        return read_shared(fd, copy=copy)
    finally:
        os.close(fd)


def bits(array):
    if isinstance(array, torch.Tensor):
        return "torch", array.dtype, tuple(array.shape), bytes(array.contiguous().reshape(-1).view(torch.uint8).numpy())
    return "numpy", array.dtype, array.shape, array.tobytes()


@given(
    st.dictionaries(names, trees, max_size=3), st.dictionaries(names, st.floats(allow_nan=False) | names), st.booleans()
)
def test_every_array_and_the_rest_come_back_bit_for_bit(sent, meta, copy):
    found_meta, found = through(meta, sent, copy=copy)
    assert found_meta == meta
    assert {name: list(tree) for name, tree in found.items()} == {n: list(tree) for n, tree in sent.items() if tree}
    for name, tree in found.items():
        for key, array in tree.items():
            assert bits(array) == bits(sent[name][key])


@given(st.dictionaries(names, trees, max_size=2), st.data())
def test_what_was_cut_is_refused(sent, data):
    fd = write_shared({"round": 1}, sent)
    try:
        os.ftruncate(fd, data.draw(st.integers(0, os.fstat(fd).st_size - 1)))
        for copy in (True, False):
            with pytest.raises(ValueError):
                read_shared(fd, copy=copy)
    finally:
        os.close(fd)


def test_parameters_strides_and_tied_memory():
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    sent = {"w": weight, "same": weight, "column": weight[:, 1], "steps": torch.randn(4, 6)[::2, 1::3]}
    sent["channels_last"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    found = through({}, {"params": sent})[1]["params"]
    for name, array in sent.items():
        assert torch.equal(found[name], array)
        assert not found[name].requires_grad


@pytest.mark.parametrize("copy", [True, False])
def test_each_reader_may_write_and_nobody_else_sees_it(copy):
    fd = write_shared({}, {"a": {"numpy": np.zeros(3), "torch": torch.zeros(3)}})
    first, second = (read_shared(fd, copy=copy)[1]["a"] for _ in range(2))
    os.close(fd)
    first["numpy"] += 1
    first["torch"] += 1
    assert not second["numpy"].any()
    assert not second["torch"].any()


def test_memory_and_files_are_given_back():
    before = open_files()
    kept = through({}, {"a": {"x": np.ones(1000), "y": torch.ones(1000)}})
    assert open_files() == before
    mapped = through({}, {"a": {"x": np.ones(1000), "y": torch.ones(1000)}}, copy=False)
    assert mapped[1]["a"]["y"].sum() == kept[1]["a"]["y"].sum() == 1000
    assert len(open_files()) == len(before) + 1
    del mapped
    assert open_files() == before


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([object()]), "delta w: numpy arrays of object"),
        (np.zeros(2, dtype=[("a", "f4")]), "delta w: numpy arrays of"),
        ([1.0], "delta w: list is neither a numpy array nor a torch tensor"),
    ],
)
def test_what_cannot_be_sent_is_named_and_leaves_no_file(array, message):
    before = open_files()
    with pytest.raises(TypeError, match=message):
        write_shared({}, {"delta": {"v": np.zeros(2), "w": array}})
    assert open_files() == before


def test_a_full_memory_is_an_os_error_and_leaves_no_file(monkeypatch):
    before = open_files()
    monkeypatch.setattr("shoal.engines.shared_trees.anonymous_file", lambda _: os.open("/dev/full", os.O_RDWR))
    with pytest.raises(OSError, match="No space left"):
        write_shared({}, {"delta": {"v": np.zeros(20_000)}})
    assert open_files() == before


def test_a_python_without_memfd_create_will_do(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert through({"a": 1}, {"t": {"x": np.arange(3)}})[1]["t"]["x"].tolist() == [0, 1, 2]
