"""``--device``, as text."""

from __future__ import annotations

from shoal.devices import Devices
from shoal.errors import ConfigurationError


def parse_device(text: str, precision: str | None = None) -> Devices:
    """Returns the devices that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` means.

    Args:
        text: One of these.
        precision: Of the computation; None for fp32.

    Raises:
        ConfigurationError: It is none of these.
    """
    accelerator, _, index = text.partition(":")
    if index and not index.isdigit():
        raise ConfigurationError(f"--device takes auto, cpu, cuda or cuda:NUMBER, not {text!r}")
    return Devices(
        accelerator=accelerator,  # type: ignore[arg-type]  # the specification refuses what it does not know
        ids=[int(index)] if index else None,
        precision=precision or "fp32",  # type: ignore[arg-type]  # likewise
    )
