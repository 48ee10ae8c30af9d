"""Parcels as NVFlare's messages: the JSON as text, and the tensors as what NVFlare streams by itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from nvflare.apis.shareable import Shareable

from shoal.deploy.parcel import Parcel, RawTensor

TASK = "shoal"
"""The name of the tasks that carry parcels."""

META, TABLE, TENSORS = "shoal_meta", "shoal_table", "shoal_tensors"
"""Under which a message has the parcel's JSON, the names, dtypes and shapes of its tensors, and their bytes."""

WITHIN = "shoal_within"
"""The header with the seconds in which the site must answer."""

REASON = "shoal_reason"
"""The header with what went wrong at a site."""

IN_MESSAGE = 1 << 20
"""Bytes of tensors up to which they travel in the message itself; arrays are fetched afterwards, in further calls."""


def packed(parcel: Parcel) -> Shareable:
    """Returns a parcel as a message, which shares the tensors' memory where they are large."""
    message = Shareable()
    message[META] = json.dumps(dict(parcel.meta))
    message[TABLE] = json.dumps([[name, tensor.dtype, tensor.shape] for name, tensor in parcel.tensors.items()])
    if parcel.nbytes <= IN_MESSAGE:
        message[TENSORS] = [bytes(tensor.data) for tensor in parcel.tensors.values()]
    else:
        message[TENSORS] = [_bytes_of(tensor) for tensor in parcel.tensors.values()]
    return message


def unpacked(message: Shareable) -> Parcel:
    """Returns the parcel in a message, without a copy of its tensors.

    Raises:
        ValueError: The message holds none.
    """
    try:
        meta, table, data = json.loads(message[META]), json.loads(message[TABLE]), message[TENSORS]
        tensors = {
            _text(name): RawTensor(dtype, tuple(map(int, shape)), _plain(one))
            for (name, dtype, shape), one in zip(table, data, strict=True)
        }
    except Exception as error:  # it is whatever a site has made of it, such as JSON that is nested too deeply
        raise ValueError(f"the message holds no parcel: {type(error).__name__}: {error}") from error
    if type(meta) is not dict:
        raise ValueError("a parcel's meta data must be a JSON object")
    return Parcel(meta=meta, tensors=tensors)


def _text(name: Any) -> str:
    if type(name) is not str:
        raise ValueError(f"a tensor's name is {name!r:.40}")
    return name


def _plain(data: Any) -> memoryview:
    """Returns bytes as they lie in memory; refuses other arrays, whose length is not that of their bytes."""
    found = memoryview(data)
    if found.format != "B" or found.ndim != 1 or not found.contiguous:
        raise ValueError(f"a tensor is sent as {found.format!r:.40} in {found.ndim} dimensions, not as bytes")
    return found


def _bytes_of(tensor: RawTensor) -> np.ndarray[Any, Any]:
    return np.frombuffer(tensor.data, np.uint8) if len(tensor.data) else np.empty(0, np.uint8)
