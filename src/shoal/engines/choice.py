"""Engines by name, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable

from shoal.data import Population
from shoal.engine import Engine
from shoal.engines.distributed import DistributedEngine
from shoal.engines.local import LOCAL_ENGINES, choose_local
from shoal.engines.workers import launched_workers
from shoal.errors import unknown_name
from shoal.learners.base import Learner

ENGINES: dict[str, Callable[..., Engine]] = {**LOCAL_ENGINES, "distributed": DistributedEngine}
"""The engines by the names that configurations and the command line know; every parameter has a default."""


def choose_engine(engine: str | Engine, learner: Learner, clients: Population) -> tuple[Engine, str]:
    """Returns the engine that a name means, opened, and one line that says which it is and why.

    Where a launcher has started several workers, it is what each of them trains its share of a cohort on.

    Args:
        engine: A name from :data:`ENGINES`, ``"auto"``, or an engine of the user's own.
        learner: What it is to run.
        clients: All of them.

    Raises:
        ConfigurationError: No engine has that name, or it cannot run here.
        WorkerError: Other workers do not come.
    """
    if isinstance(engine, str) and engine not in ("auto", *ENGINES):
        raise unknown_name("engine", engine, ["auto", *ENGINES])
    if engine == "distributed":
        engine = DistributedEngine()
    elif launched_workers() > 1 and not isinstance(engine, DistributedEngine):
        engine = DistributedEngine(engine)
    if isinstance(engine, DistributedEngine):
        engine.open(learner, clients)
        return engine, engine.choice
    return choose_local(engine, learner, clients)
