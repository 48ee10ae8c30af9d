"""Parcels as Flower's records, at the server and at the sites."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shoal.deploy.parcel import Parcel, RawTensor
from shoal.errors import MissingExtraError

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
except ModuleNotFoundError as missing:
    raise MissingExtraError("flwr", purpose="talk with Flower's processes", extra="flower") from missing

TENSORS, META, JSON = "tensors", "shoal", "json"
"""The names of the records, and of the one entry among the meta data."""

STYPE = "shoal.raw"
"""What Flower is told of how the arrays' bytes were made."""


def arrays_of(tensors: Mapping[str, RawTensor]) -> Any:
    """Returns tensors as a record of Flower's, which keeps its own copy of the bytes."""
    return ArrayRecord(
        {
            name: Array(dtype=tensor.dtype, shape=tuple(tensor.shape), stype=STYPE, data=bytes(tensor.data))
            for name, tensor in tensors.items()
        }
    )


def records_of(parcel: Parcel, arrays: Any = None) -> Any:
    """Returns a parcel as the content of a message.

    Args:
        parcel: What to send.
        arrays: Its tensors as :func:`arrays_of` made them, where that has been done.
    """
    told = ConfigRecord({JSON: json.dumps(dict(parcel.meta))})
    return RecordDict({META: told, TENSORS: arrays_of(parcel.tensors) if arrays is None else arrays})


def parcel_of(records: Any) -> Parcel:
    """Returns the parcel that a message's content holds.

    Raises:
        ValueError: It holds none, or one that is damaged.
    """
    try:
        meta = json.loads(records[META][JSON])
        tensors = {name: _tensor(array) for name, array in records[TENSORS].items()}
    except Exception as error:  # it is whatever a site has made of it: other records, or JSON that is nested too deeply
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"a message of Flower's holds no parcel of shoal's: {told}") from error
    if type(meta) is not dict:
        raise ValueError("a message of Flower's holds no parcel of shoal's: its meta data are no JSON object")
    return Parcel(meta=meta, tensors=tensors)


def _tensor(array: Any) -> RawTensor:
    if array.stype != STYPE:
        raise ValueError(f"an array is written as {array.stype!r:.40}, not as {STYPE!r}")
    return RawTensor(array.dtype, tuple(map(int, array.shape)), array.data)
