"""What a server at the other end of a submission is to run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from shoal.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the server is to run, as JSON."""

    experiment: str
    """A built-in experiment, a Python file, or the folder of an exported job, on the server's machine."""
    name: str
    """Under which the sites allow it."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The experiment's settings, as on the command line."""
    run_dir: str = ""
    """The run's folder on the server's machine."""
    resume: bool = False
    """Whether to go on with the run in it."""

    def to_json(self) -> str:
        """Returns it as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Returns the order that :meth:`to_json` wrote.

        Raises:
            ConfigurationError: It is none.
        """
        try:
            told: Any = json.loads(text)
            return cls(**{**told, "settings": {str(key): str(value) for key, value in told["settings"].items()}})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"that is no order for a server: {type(error).__name__}: {error}") from error
