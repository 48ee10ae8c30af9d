"""Which trackers there are, and what they need."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

from shoal.errors import ConfigurationError, MissingExtraError, unknown_name

TRACKERS = {"mlflow": "MLflow", "wandb": "Weights & Biases"}
"""Their names, which are also their extras', and what people call them."""

LOCAL_STORE = ("sqlalchemy", "alembic")
"""What MLflow needs beside its smallest package to write to a file."""


def check_trackers(names: Sequence[str]) -> None:
    """Makes sure that each name is a tracker's.

    Raises:
        ConfigurationError: One is not, or a lone string was given.
    """
    if isinstance(names, str):
        raise ConfigurationError(f"trackers takes a sequence of names: write trackers=[{names!r}]")
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", str(name), TRACKERS)


def require_trackers(names: Sequence[str]) -> None:
    """Makes sure that the packages of some trackers are installed; imports none of them.

    Raises:
        MissingExtraError: One is not.
    """
    for name in names:
        local = name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI")
        for package in (name, *(LOCAL_STORE if local else ())):
            if not _installed(package):
                raise MissingExtraError(package, purpose=f"track with {TRACKERS[name]}", extra=name)


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None
