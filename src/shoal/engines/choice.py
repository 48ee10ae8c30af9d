"""Engines by name, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable

from shoal.engines.base import Engine
from shoal.engines.sequential import SequentialEngine
from shoal.errors import unknown_name

ENGINES: dict[str, Callable[[], Engine]] = {"sequential": SequentialEngine}
"""The engines by the names that configurations and the command line know."""


def choose_engine(engine: str | Engine) -> tuple[Engine, str]:
    """Returns the engine that a name means, and one line that says which it is and why.

    Args:
        engine: A name from :data:`ENGINES`, ``"auto"``, or an engine of the user's own.

    Raises:
        ConfigurationError: No engine has that name.
    """
    if not isinstance(engine, str):
        return engine, f"engine {engine.name}: given"
    if engine == "auto":
        return SequentialEngine(), "engine sequential: it holds any learner"
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ["auto", *ENGINES])
    return ENGINES[engine](), f"engine {engine}: asked for"
