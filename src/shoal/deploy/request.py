"""What the server asks of a site, as JSON that the site does not trust."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

PROTOCOL = 1
"""Counts the changes of what server and sites say to each other."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of runs, sites and experiments."""

LARGEST = 1 << 20
"""The most entries of a table, and the most characters of a text."""

Kind = Literal["hello", "train", "evaluate", "end"]

KINDS = ("hello", "train", "evaluate", "end")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request. The arrays go beside it, named ``params/…``, ``buffers/…``, ``constants/…``, ``correction/…``.

    Raises:
        ValueError: It is none that a server of this version makes; the message says why.
    """

    kind: Kind
    """``hello``: make ready, and say who you are; ``train`` or ``evaluate`` a model; ``end``: the run is over."""
    run: str
    """The run's own name, the same after a resume."""
    attempt: int = 0
    """How often the server was started for it."""
    number: int = 0
    """Counts the tasks of an attempt; a site that is asked again answers what it has answered."""
    experiment: str
    """The name under which sites allow it."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The experiment's, as the server has them."""
    digest: str = ""
    """Of what the learner is at the server; a site with another one refuses."""
    clients: Mapping[str, int] = field(default_factory=dict)
    """Which client of the federation each site is; empty in a first hello."""
    seed: int = 0
    """The run's."""
    round: int = 0
    """The number of the round."""
    rounds: int = 0
    """How many there will be."""
    proximal: float = 0.0
    """The strength of the objective's proximal term."""
    corrected: bool = False
    """Whether the objective has a linear term."""
    framework: str = "torch"
    """Whose arrays the model has: ``torch`` or ``numpy``."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """Further names that the model's state dict has, each with the one of the same array."""
    seconds: float = 3600.0
    """After which the server will not wait any more."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r:.40} is not one of {', '.join(KINDS)}")
        for name in ("run", "experiment"):
            if not NAME.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)!r:.60} is no name")
        if self.framework not in ("torch", "numpy"):
            raise ValueError(f"framework {self.framework!r:.40} is neither torch nor numpy")
        for name in ("attempt", "number", "round", "rounds", "proximal", "seconds", "seed"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ValueError(f"{name} is {getattr(self, name)!r:.40}, and must be ≥ 0")
        if min(self.clients.values(), default=0) < 0:
            raise ValueError(f"clients has {min(self.clients.values())!r:.40}, and they are counted from 0")

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        told = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in told.items()}
        return {"protocol": PROTOCOL, **plain}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """Returns the request that a server has sent.

        Raises:
            ValueError: A field is missing, unknown, or of another kind than it should be.
        """
        fields = {item.name: item for item in dataclasses.fields(cls)}
        if told.get("protocol") != PROTOCOL:
            raise ValueError(
                f"the server speaks protocol {told.get('protocol')!r:.20}, and this site {PROTOCOL}: "
                "install the same version of shoal at both"
            )
        given = {name: value for name, value in told.items() if name != "protocol"}
        if unknown := sorted(given.keys() - fields.keys()):
            raise ValueError(f"field {unknown[0]!r:.40} is unknown")
        if missing := [name for name in ("kind", "run", "experiment") if name not in given]:
            raise ValueError(f"field {missing[0]} is missing")
        return cls(**{name: _checked(name, value, str(fields[name].type)) for name, value in given.items()})


def _checked(name: str, value: Any, kind: str) -> Any:
    """Returns a field's value if it is of the kind that its annotation says."""
    if kind.startswith("Mapping"):
        good = _is_table(value, int if kind.endswith("int]") else str)
    elif kind == "float":
        good = type(value) in (int, float)
    else:
        wanted = {"int": int, "bool": bool}.get(kind, str)
        good = type(value) is wanted and not (wanted is str and len(str(value)) > LARGEST)
    if not good:
        raise ValueError(f"field {name} is {value!r:.60}, and must be of kind {kind}")
    try:
        return float(value) if kind == "float" else value
    except OverflowError as error:
        raise ValueError(f"field {name} is {value!r:.60}, and too large") from error


def _is_table(value: Any, of: type) -> bool:
    if not isinstance(value, dict) or len(value) > LARGEST:
        return False
    if not all(type(key) is str and type(each) is of for key, each in value.items()):
        return False
    return sum(len(key) + len(str(each)) for key, each in value.items()) <= LARGEST
