"""What an engine is: it runs a cohort and yields what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shoal.data import Dataset
from shoal.learners.base import Learner
from shoal.types import Broadcast, Update


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientTask:
    """One client's part in a round."""

    client: int
    """The client's index in the population."""
    data: Dataset
    """Its training examples."""
    rng: np.random.Generator
    """Its randomness in this round."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientResult:
    """What came of one client's task: an update or an error."""

    client: int
    """The client's index in the population."""
    update: Update | None = None
    """What the client sent back."""
    error: Exception | None = None
    """What stopped it, with its traceback."""


class Engine(Protocol):
    """Runs the tasks of a cohort. Results may come in any order; the sum does not depend on it beyond rounding."""

    name: str
    """The engine's name in configurations and messages."""

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Iterable[ClientTask]) -> Iterator[ClientResult]:
        """Yields one result for each task, and holds no more of them than it must.

        A client's exception becomes its result. Only what stops the whole program, such as Ctrl-C, is raised.
        """
        ...  # pragma: no cover
