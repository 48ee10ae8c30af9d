from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("nvflare")

from nvflare.apis.shareable import Shareable
from nvflare.app_common.decomposers.numpy_decomposers import NumpyArrayDecomposer
from nvflare.fuel.utils import fobs

from shoal.deploy.nvflare_messages import IN_MESSAGE, META, TABLE, TENSORS, packed, unpacked
from shoal.deploy.parcel import Parcel, RawTensor, raw


def parcel_of(count):
    """A parcel with so many bytes in its largest tensor, one of a dtype that numpy lacks, and one without elements."""
    return Parcel(
        meta={"number": 3, "text": "µ {x} ${y}", "deep": [1, {"a": None}]},
        tensors={
            "large": raw(np.arange(count, dtype=np.uint8)),
            "half": RawTensor("bfloat16", (2, 3), bytes(range(12))),
            "none": raw(np.empty((0, 4), np.float32)),
            "scalar": raw(np.float64(1.5)),
        },
    )


@pytest.mark.parametrize("count", [10, IN_MESSAGE + 1])
def test_a_parcel_comes_through_nvflares_own_encoding(count):
    fobs.register(NumpyArrayDecomposer)  # as NVFlare's processes do when they start
    sent = parcel_of(count)
    message = packed(sent)
    got = unpacked(fobs.loads(fobs.dumps(message)))
    assert got.meta == sent.meta
    assert list(got.tensors) == list(sent.tensors)
    for name, tensor in sent.tensors.items():
        assert (got.tensors[name].dtype, got.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(got.tensors[name].data) == bytes(tensor.data)


def test_large_tensors_are_not_copied():
    array = np.zeros(IN_MESSAGE + 1, np.uint8)
    message = packed(Parcel(meta={}, tensors={"w": raw(array)}))
    assert np.shares_memory(message[TENSORS][0], array)
    assert np.shares_memory(np.frombuffer(unpacked(message).tensors["w"].data, np.uint8), array)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {META: "{", TABLE: "[]", TENSORS: []},
        {META: "[]", TABLE: "[]", TENSORS: []},
        {META: "{}", TABLE: json.dumps([["w", "float32", [2]]]), TENSORS: []},
        {META: "{}", TABLE: json.dumps([["w", "float32", [2]]]), TENSORS: [b"123"]},
        {META: "{}", TABLE: json.dumps([["w", "object", [1]]]), TENSORS: [b"12345678"]},
        {META: "{}", TABLE: json.dumps([["w", "float32"]]), TENSORS: [b"1234"]},
        {META: "{}", TABLE: json.dumps([["w", "uint8", [4]]]), TENSORS: ["1234"]},
        {META: "[" * 100_000, TABLE: "[]", TENSORS: []},
        {META: "{}", TABLE: "[" * 100_000, TENSORS: []},
        {META: "{}", TABLE: json.dumps([["w", "uint8", [float("inf")]]]), TENSORS: [b"1234"]},
        {META: "{}", TABLE: json.dumps([[7, "uint8", [4]]]), TENSORS: [b"1234"]},
        {META: "{}", TABLE: json.dumps([["w", "uint8", [4]]]), TENSORS: [np.zeros((4, 9), np.uint8)]},
        {META: "{}", TABLE: json.dumps([["w", "uint8", [4]]]), TENSORS: [np.zeros(4, np.float32)]},
        {META: "{}", TABLE: json.dumps([["w", "uint8", [4]]]), TENSORS: [np.zeros(8, np.uint8)[::2]]},
    ],
)
def test_what_is_no_parcel_is_refused(content):
    message = Shareable()
    message.update(content)
    with pytest.raises(ValueError):
        unpacked(message)
