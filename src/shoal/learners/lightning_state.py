"""The state of optimizers and schedulers as tensors and JSON, without pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shoal.errors import ConfigurationError

KIND = "kind"
"""The key that marks what JSON has no form for."""


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Returns a nested state in two parts.

    Args:
        tree: Mappings, lists, tuples, numbers, strings, None and tensors.

    Returns:
        The tensors by their places, as copies on the CPU, each with memory of its own; and JSON that refers to them.

    Raises:
        ConfigurationError: Something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _packed(tree, "state", tensors)


def unpack(tensors: Mapping[str, Tensor], meta: Any) -> Any:
    """Returns what :func:`pack` was given."""
    if isinstance(meta, list):
        return [unpack(tensors, item) for item in meta]
    if not isinstance(meta, dict):
        return meta
    match meta[KIND]:
        case "tensor":
            return tensors[meta["name"]].clone()
        case "tuple":
            return tuple(unpack(tensors, item) for item in meta["items"])
        case "counter":
            return Counter(dict(meta["items"]))
        case _:
            return {key: unpack(tensors, item) for key, item in meta["items"]}


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().clone().contiguous()
        return {KIND: "tensor", "name": place}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Counter):  # what MultiStepLR counts its milestones with
        return {KIND: "counter", "items": [[key, count] for key, count in value.items()]}
    if isinstance(value, Mapping):
        # As pairs, because JSON would make strings of the numbers by which optimizers know their parameters.
        items = [[key, _packed(item, f"{place}.{key}", tensors)] for key, item in value.items()]
        return {KIND: "mapping", "items": items}
    if isinstance(value, list | tuple):
        packed = [_packed(item, f"{place}.{index}", tensors) for index, item in enumerate(value)]
        return packed if isinstance(value, list) else {KIND: "tuple", "items": packed}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy's
        return value.item()
    raise ConfigurationError(
        f"the optimizer's state has a {type(value).__name__} at {place}, which cannot be carried without pickle: "
        "say keep_optimizer=False, or use another optimizer or scheduler"
    )
