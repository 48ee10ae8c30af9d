"""The arrays of models by name, and their kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from shoal.client.keras_models import arrays_of, is_keras_model
from shoal.errors import ConfigurationError
from shoal.types import Array

if TYPE_CHECKING:
    from torch import Tensor

WRAPPED = ("module.", "_orig_mod.")
"""What ``DistributedDataParallel`` and ``torch.compile`` put before the names of what they wrap."""


def arrays_by_name(model: Any) -> dict[str, Array]:
    """Returns a model's arrays by name.

    Args:
        model: A module, a Keras model, or such arrays already.
    """
    if is_keras_model(model):
        return dict(arrays_of(model))
    return dict(model.state_dict() if hasattr(model, "state_dict") else model)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the names by what they are without a wrapper around the whole module."""
    plain = {name: name for name in names}
    while prefix := next((one for one in WRAPPED if plain and all(name.startswith(one) for name in plain)), None):
        plain = {name.removeprefix(prefix): own for name, own in plain.items()}
    return plain


def refuse_parts(arrays: Mapping[str, Any], instead: str) -> None:
    """Refuses arrays of which this rank has a part only.

    Args:
        arrays: By name.
        instead: What to do about it.

    Raises:
        ConfigurationError: There is one.
    """
    for name, array in arrays.items():
        if _divided(array):
            raise ConfigurationError(f"{name} is divided among the ranks (FSDP): {instead}")


def own_part(parameter: Tensor) -> Tensor:
    """Returns what of a parameter this rank has: all of it, or its part of one that is divided among the ranks."""
    part: Tensor = cast("Any", parameter).to_local() if _divided(parameter) else parameter
    return part


def part_as(parameter: Tensor, array: Array) -> Tensor:
    """Returns what of an array belongs to this rank's part of a parameter, on the parameter's device.

    Args:
        parameter: May be divided among the ranks.
        array: Of the whole parameter's shape.
    """
    whole: Tensor = array.to(parameter.device)
    if not _divided(parameter):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = cast("DTensor", parameter)
    # All ranks have the whole array, so each cuts its own part and none is sent.
    divided: DTensor = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return divided.to_local()


def _divided(array: Any) -> bool:
    return type(array).__name__ == "DTensor"
