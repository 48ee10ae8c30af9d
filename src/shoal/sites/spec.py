"""What a site is, as the user writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from shoal.description import describe
from shoal.devices import Devices
from shoal.errors import ConfigurationError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

LARGEST_CONFIG = 1 << 14
"""Bytes that a site's settings may take as JSON."""


@dataclass(frozen=True, eq=False)
class Site:
    """One client of a federation with its own processes and devices.

    Example::

        shoal.Site("site-1", devices=[0, 1], config={"data_dir": "/data/site-1"})

    Raises:
        ConfigurationError: A value is out of its range, or cannot be told to another process.
    """

    name: str
    """What messages call it, and its files; letters, digits, dots, dashes and underscores."""
    _: KW_ONLY
    devices: int | Sequence[int] | Devices = 1
    """How many devices it has, a process (rank) for each: CUDA devices where there are any, else CPU processes; or the
    indices of its CUDA devices; or all that :class:`~shoal.Devices` can say."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The site's own settings, as JSON: its script finds them in ``task.config``."""
    args: Sequence[str] = ()
    """Arguments of the script, after those that all sites have: what it needs before its first task."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of its processes, beside those of this one; they win over shoal's choice of devices."""
    python: str | None = None
    """The interpreter that runs the script; None for this one. It must have shoal."""
    command: Sequence[str] = ()
    """What to put before the interpreter that launches the ranks, such as ``["nice", "-n", "5"]``."""
    data: Any = None
    """The site's examples (arrays, a torch data set), where a learner trains rather than a script; or a function
    without arguments that returns them, called at the site alone."""
    evaluate: Any = None
    """The site's held-out examples, likewise, on which it measures the global model, where a learner trains."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"a site's name names its files: letters, digits, dots, dashes and underscores, not {self.name!r}"
            )
        for name in ("args", "command"):
            if isinstance(getattr(self, name), str):
                raise ConfigurationError(f"{name} of {self.name} is a list of words, not {getattr(self, name)!r}")
        try:
            size = len(json.dumps(dict(self.config)))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"config of {self.name} must be JSON: {error}") from error
        if size > LARGEST_CONFIG:
            raise ConfigurationError(
                f"config of {self.name} has {size} bytes, of at most {LARGEST_CONFIG}: give the path of a file"
            )
        spread = self.spread  # refused here, if it cannot be
        if spread.strategy != "single" and spread.count is None and spread.ids is None:
            raise ConfigurationError(
                f"{self.name} does not say how many devices it has: Devices({spread.strategy!r}, count=…)"
            )

    @property
    def fetches(self) -> bool:
        """Whether its examples are there only once the site asks for them."""
        return _is_function(self.data)

    def examples(self) -> Any:
        """Returns the site's examples."""
        return self.data() if _is_function(self.data) else self.data

    def held_out(self) -> Any:
        """Returns the site's held-out examples; None where it has none."""
        return self.evaluate() if _is_function(self.evaluate) else self.evaluate

    @property
    def spread(self) -> Devices:
        """The site's devices, in full."""
        devices = self.devices
        if isinstance(devices, Devices):
            return devices
        if isinstance(devices, int):
            return Devices("ddp" if devices > 1 else "single", count=devices)
        ids = tuple(devices)
        return Devices("ddp" if len(ids) > 1 else "single", count=len(ids), accelerator="cuda", ids=ids)

    @property
    def ranks(self) -> int:
        """How many processes it has."""
        spread = self.spread
        if not spread.ranked:
            return 1
        return spread.count or len(spread.ids or ()) or 1

    def describe(self) -> dict[str, Any]:
        """Returns what decides the site's numbers, as JSON."""
        told = {"name": self.name, "config": dict(self.config), "args": list(self.args), "ranks": self.ranks}
        if self.data is not None:
            told |= {"strategy": self.spread.strategy, "data": describe(self.data)}
        return told


def _is_function(data: Any) -> bool:
    return callable(data) and not hasattr(data, "__len__")
