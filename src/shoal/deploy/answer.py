"""What a site answers, as JSON that the server does not trust."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from shoal.deploy.request import NAME, PROTOCOL

LARGEST_ERROR = 4000
"""Characters of an error that are kept."""

METRICS = 1000
"""The most metrics that are taken."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer; the arrays go beside it, by the model's own names.

    Raises:
        ValueError: It is none that a site of this version gives; the message says why.
    """

    site: str = ""
    """Whose it is."""
    number: int = 0
    """Of the task that it answers."""
    error: str = ""
    """What went wrong, in words; empty where all is well."""
    refused: bool = False
    """Whether the site will not do it, however often it is asked."""
    busy: bool = False
    """Whether the site works for another run now."""
    away: bool = False
    """Whether the site's own process could not be reached, and only who was to do so answers."""
    evaluates: bool = False
    """Whether it can measure a model."""
    examples: float = 0.0
    """How many examples the answer is about."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over them."""
    tree: str = ""
    """What the arrays are: ``params``, ``delta``, or nothing."""
    seconds: float = 0.0
    """How long the site's rank 0 worked at it, from having the model to its reply."""

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON; numbers that JSON has not as text."""
        return {
            "protocol": PROTOCOL,
            **vars(self),
            "metrics": {name: _told(value) for name, value in self.metrics.items()},
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """Returns the answer that a site has sent.

        Raises:
            ValueError: A field is of another kind than it should be.
        """
        try:
            return cls._read(told)
        except RecursionError as error:  # of what it is to say of it
            raise ValueError("it is nested too deeply") from error

    @classmethod
    def _read(cls, told: Mapping[str, Any]) -> Self:
        if told.keys() == {"error"}:
            return cls(error=_text(told, "error")[:LARGEST_ERROR], away=True)
        if told.get("protocol") != PROTOCOL:
            raise ValueError(
                f"the site speaks protocol {told.get('protocol')!r:.20}, and this server {PROTOCOL}: "
                "install the same version of shoal at both"
            )
        metrics = told.get("metrics", {})
        if not isinstance(metrics, dict) or len(metrics) > METRICS:
            raise ValueError("its metrics are no small JSON object")
        number = told.get("number", 0)
        if type(number) is not int:
            raise ValueError(f"its number is {number!r:.40}, and must be a whole one")
        site, tree = _text(told, "site"), _text(told, "tree")
        if site and not NAME.fullmatch(site):
            raise ValueError(f"its name {site!r:.60} is none")
        if tree not in ("", "params", "delta"):
            raise ValueError(f"its arrays are {tree!r:.40}, and not params or delta")
        return cls(
            site=site,
            number=number,
            error=_text(told, "error")[:LARGEST_ERROR],
            refused=bool(told.get("refused")),
            busy=bool(told.get("busy")),
            evaluates=bool(told.get("evaluates")),
            examples=_number(told.get("examples", 0.0)),
            metrics={str(name)[:200]: _number(value) for name, value in metrics.items()},
            tree=tree,
            seconds=_number(told.get("seconds", 0.0)),
        )


def _told(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _text(told: Mapping[str, Any], name: str) -> str:
    value = told.get(name, "")
    if type(value) is not str:
        raise ValueError(f"its {name} is {value!r:.40}, and must be text")
    return value


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{value!r:.40} is no number") from error
