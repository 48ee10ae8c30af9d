"""An optimizer's state as tensors and JSON, whole, whatever the devices it was divided among."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ConfigurationError
from shoal.learners.torch_strategies import part_of, whole

PREFIX = "optimizer"


def pack_optimizer(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns an optimizer's state; every rank must ask.

    Args:
        optimizer: Over some of the parameters.
        params: The parameters by name.
        keep: Whether the tensors are wanted here, and not only on another rank.

    Returns:
        Tensors named ``optimizer/PARAMETER/KEY``, and JSON.

    Raises:
        ConfigurationError: A part of it is neither a number nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in params.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                gathered = whole(value.detach())
                if keep:
                    tensors[f"{PREFIX}/{name}/{key}"] = gathered.cpu().clone()
            elif value is None or isinstance(value, bool | int | float):
                numbers.setdefault(name, {})[key] = value
            else:
                raise _unknown(optimizer, key, value)
    names = {id(parameter): name for name, parameter in params.items()}
    groups = [
        {"params": [names[id(parameter)] for parameter in group["params"]], "settings": _settings(optimizer, group)}
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "numbers": numbers}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> None:
    """Puts a state back that :func:`pack_optimizer` gave, perhaps on other ranks.

    Args:
        optimizer: Made anew, with the groups of the one that was packed.
        params: The parameters by name.
        tensors: The tensors, whole; others may be among them.
        meta: The JSON.
    """
    kept: dict[str, dict[str, Any]] = {name: dict(numbers) for name, numbers in meta["numbers"].items()}
    for path, tensor in tensors.items():
        prefix, _, rest = path.partition("/")
        if prefix == PREFIX:
            name, _, key = rest.rpartition("/")
            kept.setdefault(name, {})[key] = part_of(tensor, params[name])
    state = optimizer.state_dict()
    order = [name for group in meta["groups"] for name in group["params"]]
    state["state"] = {order.index(name): values for name, values in kept.items()}
    for group, saved in zip(state["param_groups"], meta["groups"], strict=True):
        for key, value in saved["settings"].items():
            group[key] = tuple(value) if isinstance(group[key], tuple) else value
    optimizer.load_state_dict(state)


def _settings(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group's learning rate and the like."""
    settings = {key: value for key, value in group.items() if key not in {"params", "param_names"}}
    for key, value in settings.items():
        parts = value if isinstance(value, tuple | list) else [value]
        if not all(part is None or isinstance(part, bool | int | float | str) for part in parts):
            raise _unknown(optimizer, key, value)
    return settings


def _unknown(optimizer: torch.optim.Optimizer, key: str, value: object) -> ConfigurationError:
    return ConfigurationError(
        f"{type(optimizer).__name__} keeps {key!r} as {type(value).__name__}, which is neither numbers nor a tensor, "
        "so its state cannot be saved: train without run_dir, or use another optimizer"
    )
