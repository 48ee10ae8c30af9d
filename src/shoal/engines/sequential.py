"""The reference engine: one resident model, the clients in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoal.engines.base import ClientResult, ClientTask
from shoal.learners.base import Learner
from shoal.types import Broadcast


class SequentialEngine:
    """Fits one client after the other on the learner's own devices. All other engines must equal it."""

    name = "sequential"

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Iterable[ClientTask]) -> Iterator[ClientResult]:
        """Yields the results in the order of the tasks."""
        for task in tasks:
            yield self._attempt(learner, broadcast, task)

    def _attempt(self, learner: Learner, broadcast: Broadcast, task: ClientTask) -> ClientResult:
        try:
            return ClientResult(client=task.client, update=learner.fit(broadcast, task.data, task.rng))
        except Exception as error:
            return ClientResult(client=task.client, error=error)
