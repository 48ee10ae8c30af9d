"""``--device``, as text."""

from __future__ import annotations

from shoal.devices import Devices
from shoal.errors import ConfigurationError


def parse_device(text: str) -> Devices:
    """Returns the devices that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` means.

    Raises:
        ConfigurationError: It is none of these.
    """
    accelerator, _, index = text.partition(":")
    if index and not index.isdigit():
        raise ConfigurationError(f"--device takes auto, cpu, cuda or cuda:NUMBER, not {text!r}")
    return Devices(
        accelerator=accelerator,  # type: ignore[arg-type]  # the specification refuses what it does not know
        id=int(index) if index else None,
    )
