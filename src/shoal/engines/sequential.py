"""The reference engine: one resident model, the clients in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shoal.data import Population
from shoal.engine import ClientResult, ClientTask
from shoal.learners.base import Learner
from shoal.types import Broadcast


class SequentialEngine:
    """Fits one client after the other on the learner's own devices. All other engines must equal it."""

    name = "sequential"

    def open(self, learner: Learner, clients: Population) -> None:
        """Does nothing: the learner holds what there is."""

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Yields the results in the order of the tasks."""
        return (attempt(learner, broadcast, task) for task in tasks)

    def close(self) -> None:
        """Does nothing."""


def attempt(learner: Learner, broadcast: Broadcast, task: ClientTask) -> ClientResult:
    """Fits one client here and now; its exception becomes its result."""
    try:
        return ClientResult(client=task.client, update=learner.fit(broadcast, task.data, task.rng()))
    except Exception as error:
        return ClientResult(client=task.client, error=error)
