"""Python objects as plain JSON, equal where the objects would do the same; for the configuration of a run."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np


def describe(value: object) -> Any:
    """Returns a JSON-able description of ``value``.

    Dataclasses become their class and fields, ``functools.partial`` its function and arguments, functions and classes
    their qualified name; a lambda or inner function also its source and the plain values it closes over, because its
    name alone would not tell two of them apart. An object with a method ``describe`` speaks for itself.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | Path):
        return value.item() if isinstance(value, np.generic) else str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((describe(item) for item in value), key=str)
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    return _describe_object(value)


def differences(before: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Returns where two JSON values differ: the key's path with dots, and each one's value there, or None."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [(prefix, before, now)]
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(before.keys() | now.keys()):
        found += differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested JSON objects by their keys' paths, with dots."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        path: found
        for key, inner in value.items()
        for path, found in flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def qualified_name(value: object) -> str:
    """Returns ``module.qualname`` of a class or function, or of an object's class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def dataclass_fields(value: Any) -> dict[str, Any]:
    """Returns the described fields of a dataclass instance, private ones left out."""
    return {
        field.name: describe(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if not field.name.startswith("_")
    }


def _describe_object(value: Any) -> Any:
    if not isinstance(value, type) and callable(getattr(value, "describe", None)):
        return value.describe()
    if isinstance(value, functools.partial):
        return {"call": describe(value.func), "args": describe(value.args), **describe(value.keywords)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"name": type(value).__name__, **dataclass_fields(value)}
    if isinstance(value, types.FunctionType) and "<" in value.__qualname__:
        return {"function": qualified_name(value), "source": _source(value), "closure": _closure(value)}
    return qualified_name(value)


def _source(function: types.FunctionType) -> str:
    try:
        return inspect.getsource(function).strip()
    except (OSError, TypeError):  # typed at a prompt
        return function.__code__.co_code.hex()


def _closure(function: types.FunctionType) -> dict[str, Any]:
    closed = inspect.getclosurevars(function).nonlocals
    return {name: describe(item) for name, item in sorted(closed.items())}
