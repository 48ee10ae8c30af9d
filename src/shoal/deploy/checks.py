"""What of a model's arrays is looked at before they are used, on both sides."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shoal.deploy.parcel import RawTensor

EXPONENTS = {"float8_e5m2": 0x7C, "bfloat16": 0x7F80}
"""The bits that are all set in what is not finite, of dtypes that numpy lacks."""

Spec = Mapping[str, tuple[str, tuple[int, ...]]]
"""The dtype and shape of each array by its name."""


def misfit(tensors: Mapping[str, RawTensor], spec: Spec) -> str | None:
    """Says how names, dtypes or shapes differ from what they should be; None where they do not."""
    for name, (dtype, shape) in spec.items():
        found = tensors.get(name)
        if found is None:
            return f"{name} is missing"
        if (found.dtype, found.shape) != (dtype, shape):
            return f"{name} is {found.dtype} {list(found.shape)}, and {dtype} {list(shape)} is expected"
    unknown = sorted(tensors.keys() - spec.keys())
    return f"{unknown[0]} is not in the model" if unknown else None


def not_finite(tensors: Mapping[str, RawTensor]) -> str | None:
    """Says which array holds NaN or infinity; None where none does."""
    for name, tensor in sorted(tensors.items()):
        if not _finite(tensor):
            return f"{name} holds NaN or infinity"
    return None


def _finite(tensor: RawTensor) -> bool:
    if tensor.dtype == "float8_e4m3fn":  # which has no infinity, and one NaN
        return not bool((np.frombuffer(tensor.data, np.uint8) & 0x7F == 0x7F).any())
    if tensor.dtype in EXPONENTS:
        bits = EXPONENTS[tensor.dtype]
        kind = np.dtype("uint16" if tensor.dtype == "bfloat16" else "uint8")
        return not bool(np.equal(np.bitwise_and(np.frombuffer(tensor.data, kind), bits), bits).any())
    if not tensor.dtype.startswith("float"):
        return True
    flat = np.frombuffer(tensor.data, tensor.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        # A sum that is finite has finite terms alone; one that is not may have overflowed.
        return bool(np.isfinite(flat.sum(dtype=np.float64))) or bool(np.isfinite(flat).all())
