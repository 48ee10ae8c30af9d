from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.deploy.checks import misfit, not_finite
from shoal.deploy.parcel import RawTensor, raw
from shoal.processes.tensors import CODES, NOT_NUMPYS, size_of

FLOATS = [kind for kind in CODES if "float" in kind]


def of(kind, data):
    return RawTensor(kind, (len(data) // size_of(kind),), data)


@pytest.mark.parametrize("kind", [kind for kind in FLOATS if size_of(kind) <= 2])
def test_every_number_of_two_bytes_or_one_is_judged_as_torch_does(kind):
    size = size_of(kind)
    bits = np.arange(2 ** (8 * size), dtype=f"uint{8 * size}")
    wide = torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, kind)).float()
    wanted = torch.isfinite(wide).numpy()
    found = np.array([not_finite({"a": of(kind, one.tobytes())}) is None for one in bits[:: 1 if size == 1 else 7]])
    np.testing.assert_array_equal(found, wanted[:: 1 if size == 1 else 7])
    assert not_finite({"a": of(kind, bits[wanted].tobytes())}) is None
    assert not_finite({"a": of(kind, bits.tobytes())}) == "a holds NaN or infinity"


@given(st.sampled_from(["float32", "float64"]), st.data())
def test_large_numbers_are_judged_as_numpy_does(kind, data):
    width = int(kind[5:])
    array = np.array(data.draw(st.lists(st.floats(width=width), max_size=6)), kind)
    assert (not_finite({"a": raw(array)}) is None) == bool(np.isfinite(array).all())


def test_sums_that_overflow_are_no_infinity():
    assert not_finite({"a": raw(np.full(9, np.finfo(np.float64).max))}) is None
    assert not_finite({"a": raw(np.array([math.inf, -math.inf]))}) == "a holds NaN or infinity"


def test_the_rest_is_finite():
    for kind in CODES.keys() - set(FLOATS):
        assert not_finite({"a": of(kind, b"\xff" * 8 if kind != "bool" else b"\1")}) is None
    assert not_finite({"a": of("bfloat16", b"")}) is None
    assert not_finite({}) is None
    assert {"bfloat16"} <= NOT_NUMPYS


SPEC = {"params/w": ("float32", (2, 3)), "buffers/n": ("int64", ())}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, None),
        ({"params/w": None}, "params/w is missing"),
        ({"params/v": ("float32", (1,))}, "params/v is not in the model"),
        ({"params/w": ("float64", (2, 3))}, "params/w is float64 [2, 3], and float32 [2, 3] is expected"),
        ({"params/w": ("float32", (3, 2))}, "params/w is float32 [3, 2], and float32 [2, 3] is expected"),
        ({"buffers/n": ("int64", (1,))}, "buffers/n is int64 [1], and int64 [] is expected"),
    ],
)
def test_what_does_not_fit_is_said(change, what):
    kinds = {name: kind for name, kind in {**SPEC, **change}.items() if kind is not None}
    sent = {name: raw(np.zeros(shape, dtype)) for name, (dtype, shape) in kinds.items()}
    assert misfit(sent, SPEC) == what
