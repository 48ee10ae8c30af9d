"""The names and kinds of arrays in the state dicts of wrapped modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shoal.errors import ConfigurationError

WRAPPED = ("module.", "_orig_mod.")
"""What ``DistributedDataParallel`` and ``torch.compile`` put before the names of what they wrap."""


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
        if type(array).__name__ == "DTensor":
            raise ConfigurationError(f"{name} is divided among the ranks (FSDP): {instead}")
