"""The cohort on several workers: each trains its share on an engine of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from shoal.data import Population
from shoal.engine import ClientTask, Engine, Result
from shoal.engines import merging
from shoal.engines.cohort import CohortSum, Outcome
from shoal.engines.local import choose_local
from shoal.engines.shares import CostEstimate, Costs, Share
from shoal.engines.workers import Workers
from shoal.learners.base import Learner
from shoal.types import Broadcast


class DistributedEngine:
    """Divides each cohort among the processes that a launcher has started; without a launcher there is this one.

    Every worker trains its share, the sums are added up in one all-reduce, and every worker makes the server's step
    itself. Worker 0 leads: the others train when it says so.

    Args:
        inner: What each worker trains its share on: an engine's name, ``"auto"``, or an engine.
    """

    name = "distributed"

    def __init__(self, inner: str | Engine = "auto") -> None:
        self.inner = inner
        self.choice = ""
        """Which engine each worker has and why, in one line."""
        self._engine: Engine | None = None
        self._workers: Workers | None = None

    def open(self, learner: Learner, clients: Population) -> None:
        """Opens the inner engine, and meets the other workers.

        Raises:
            ConfigurationError: The inner engine cannot run here.
            WorkerError: The others do not come.
        """
        workers = Workers.join()
        # The inner engine before the connections for sums, which touch CUDA: what it forks then may use that too.
        self._engine, line = choose_local(self.inner, learner, clients)
        try:
            workers.connect()
        except BaseException:
            self.close()
            raise
        self._workers, count = workers, workers.count
        self._estimate = CostEstimate(count)
        self._costs = self._estimate.costs()
        self._began, self._share = 0.0, Share(clients=0, examples=0, seconds=0.0)
        how_many = "1 worker" if count == 1 else f"{count} workers"
        self.choice = f"engine distributed: {how_many}, each with {line}"

    @property
    def local(self) -> Engine:
        """What this worker trains its shares on; there from :meth:`open` to :meth:`close`."""
        assert self._engine is not None, "the engine is not open"  # noqa: S101
        return self._engine

    @property
    def workers(self) -> Workers:
        """All workers; there from :meth:`open` to :meth:`close`."""
        assert self._workers is not None, "the engine is not open"  # noqa: S101
        return self._workers

    def follow(self) -> Any:
        """Waits, on any worker but the leader, until a round begins or the run ends.

        Returns:
            None where a round begins; else what :meth:`finish` was given.

        Raises:
            WorkerError: A worker failed or is gone.
            KeyboardInterrupt: One was interrupted.
        """
        said = self.workers.from_leader("next")
        if "over" in said:
            return said["over"]
        self._costs = Costs(client=said["client"], example=said["example"], speeds=tuple(said["speeds"]))
        return None

    def finish(self, told: Any) -> None:
        """Ends the run on the other workers, who are given something, as JSON; only on the leader."""
        self.workers.from_leader("next", {"over": told})

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Sequence[ClientTask]) -> Iterator[Result]:
        """Yields the results of this worker's share; on the leader it first sends the others into the round."""
        if self.workers.leads:
            self._costs = self._estimate.costs()
            costs = {"client": self._costs.client, "example": self._costs.example, "speeds": self._costs.speeds}
            self.workers.from_leader("next", costs)
        self._began = time.perf_counter()
        examples = [len(task.data) for task in tasks]
        places = self._costs.shares(examples)[self.workers.rank]
        self._share = Share(clients=len(places), examples=sum(examples[place] for place in places), seconds=0.0)
        for result in self.local.run(learner, broadcast, [tasks[place] for place in places]):
            yield result
            self.workers.watch()

    def combine(self, summed: CohortSum, cohort: Sequence[int]) -> list[Outcome]:
        """Makes the sum of this worker's share that of the whole cohort, on all workers.

        Args:
            summed: The settled sum of the share; changed in place.
            cohort: All clients of the round.

        Returns:
            What became of the other workers' clients.

        Raises:
            WorkerError: A worker failed or is gone.
            KeyboardInterrupt: One was interrupted.
        """
        share = {"clients": self._share.clients, "examples": self._share.examples}
        own = {"share": {**share, "seconds": time.perf_counter() - self._began}, **merging.summary(summed)}
        others = self.workers.gather("done", own)
        together = None
        if self.workers.leads:
            every = [own, *others]
            self._estimate.note([Share(**one["share"]) for one in every])
            together = merging.merged(every)
        return merging.merge(summed, self.workers.from_leader("sum", together), cohort, self.workers.add_up)

    def close(self) -> None:
        """Closes the inner engine. The workers stay together until their processes end."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._workers = None
