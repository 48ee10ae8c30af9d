"""The user's optimizer over the stacked parameters of many clients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ELEMENT_WISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
)
"""Optimizers that treat each number by itself, and so many clients' numbers as those of one large model."""

RECORDABLE = tuple(kind for kind in ELEMENT_WISE if kind is not torch.optim.ASGD)
"""Those that count their steps on the host, if at all. ASGD counts on the device, and reads from it."""


def stacked_optimizer(template: torch.optim.Optimizer, stacked: Mapping[int, Tensor]) -> torch.optim.Optimizer:
    """Returns the same optimizer over stacked parameters.

    Args:
        template: The user's optimizer over the parameters of one client, with the groups that the user made of them.
        stacked: The stacked parameter for each of those, by its id.
    """
    groups = [
        {**group, "params": [stacked[id(parameter)] for parameter in group["params"]]}
        for group in template.param_groups
    ]
    for group in groups:
        group.pop("param_names", None)
    optimizer = type(template)(groups)  # type: ignore[call-arg]  # every setting is in the groups
    _allow_recording(optimizer)
    return optimizer


def plain_rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Returns the rates of those parameters that make a step of plain SGD, ``w − rate · gradient``, by their ids."""
    if type(optimizer) is not torch.optim.SGD:
        return {}
    return {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        if not any(group[name] for name in ("momentum", "weight_decay", "maximize"))
        and not isinstance(group["lr"], Tensor)
        for parameter in group["params"]
    }


def optimizer_settings(optimizer: torch.optim.Optimizer) -> str | None:
    """Returns what tells an optimizer's steps from another's, but for its arrays; None if it cannot be recorded."""
    if type(optimizer) not in RECORDABLE:
        return None
    groups = [
        {name: value for name, value in group.items() if name not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    values = [value for group in groups for value in group.values()]
    parts = [part for value in values for part in (value if isinstance(value, tuple | list) else [value])]
    if any(isinstance(part, Tensor) for part in parts):  # read where it is, and when
        return None
    return repr([(len(group["params"]), own) for group, own in zip(optimizer.param_groups, groups, strict=True)])


def _allow_recording(optimizer: torch.optim.Optimizer) -> None:
    """Lets a step be recorded that counts on the host.

    torch refuses that, because the count would be the same in each replay. Here it is to be: an optimizer lives for one
    block, and a block is recorded from its first step to its last. The numbers are those of the optimizer as the user
    made it; with ``capturable=True`` they would be others, because the corrections for the first steps are then
    computed in 32 bits.
    """
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # torch 2.12, and 2.11
        setattr(optimizer, name, lambda: None)
