"""The engines of one process, by name, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shoal.data import Population
from shoal.engine import Engine
from shoal.engines.process import ProcessEngine
from shoal.engines.sequential import SequentialEngine
from shoal.engines.vectorized import VectorizedEngine
from shoal.errors import CannotStackError, unknown_name
from shoal.learners.base import Learner

LOCAL_ENGINES: dict[str, Callable[..., Engine]] = {
    "process": ProcessEngine,
    "sequential": SequentialEngine,
    "vectorized": VectorizedEngine,
}
"""The engines by the names that configurations and the command line know."""


def choose_local(engine: str | Engine, learner: Learner, clients: Population) -> tuple[Engine, str]:
    """Returns the engine that a name means, opened, and one line that says which it is and why.

    Args:
        engine: A name from :data:`LOCAL_ENGINES`, ``"auto"``, or an engine of the user's own.
        learner: What it is to run.
        clients: All of them.

    Raises:
        ConfigurationError: No engine has that name, or it cannot run here.
    """
    if engine == "auto":
        return _fastest(learner, clients)
    if isinstance(engine, str):
        if engine not in LOCAL_ENGINES:
            raise unknown_name("engine", engine, ["auto", *LOCAL_ENGINES])
        made, why = LOCAL_ENGINES[engine](), "asked for"
    else:
        made, why = engine, "given"
    made.open(learner, clients)
    return made, f"engine {made.name}: {why}"


def _fastest(learner: Learner, clients: Population) -> tuple[Engine, str]:
    """Chooses without a clock, so that equal runs have equal engines."""
    vectorized = VectorizedEngine()
    try:
        trainer = vectorized.trainer(learner, clients.dataset)
    except CannotStackError as error:
        return SequentialEngine(), f"engine sequential: {error}"
    if not trainer.pads and len(np.unique(clients.sizes)) > 1:
        why = "clients of unequal size whose batches cannot be padded are as fast"
        return SequentialEngine(), f"engine sequential: {why}"
    return vectorized, "engine vectorized: the clients' models can be stacked, and end as they would one by one"
