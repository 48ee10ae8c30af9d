"""Engine ``sites``: processes on this machine that are launched, watched and federated like real sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal.data import Population
from shoal.engine import ClientResult, ClientTask
from shoal.errors import ConfigurationError
from shoal.learners.base import Learner
from shoal.learners.script import ties_at_server
from shoal.sites.allotment import Allotment
from shoal.sites.policy import SitePolicy
from shoal.sites.process import Starter
from shoal.sites.runner import SiteRunner
from shoal.sites.spec import Site
from shoal.sites.state import Reply
from shoal.sites.task import SiteTask
from shoal.types import Broadcast, ModelState


@dataclass
class SitesEngine:
    """Runs each client as a site of its own on this machine, for the whole run; :class:`shoal.Job` makes it.

    Args:
        sites: One for each client, in their order.
        starter: Starts a site's launcher.
        allotment: Which devices each site has.
        policy: What to do about failures.
        verbose: Whether to show what all ranks write, and not only each site's rank 0.
    """

    sites: Sequence[Site]
    starter: Starter
    allotment: Allotment
    policy: SitePolicy = field(default_factory=SitePolicy)
    verbose: bool = False
    rounds: int = 0
    """How many rounds the federation has, which the sites are told."""
    name: str = "sites"

    def __post_init__(self) -> None:
        self.seconds: dict[int, float] = {}
        """How long each site of the last round worked at its task, by client."""
        self._ties: dict[str, str] | None = None
        self._runner: SiteRunner | None = None
        self._kept: list[Reply] = []

    def open(self, learner: Learner, clients: Population) -> None:  # noqa: ARG002 - the sites have their own data
        """Starts all sites; their ranks stay until :meth:`close`.

        Raises:
            ConfigurationError: A site cannot be started, or there are too few devices.
        """
        learner.preload()
        self._ties = None
        runner = SiteRunner(self.sites, self.starter, self.allotment, self.policy, verbose=self.verbose)
        runner.rounds = self.rounds
        runner.open()
        self._runner = runner

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Yields what each site replies, as the replies come."""
        self._let_go()
        self.seconds = {}
        work = self._task("train", broadcast, learner, seed=tasks[0].seed if tasks else 0)
        for client, reply, problem in self._opened().gather(work, [task.client for task in tasks]):
            if reply is None:
                yield ClientResult(client=client, error=problem)
                continue
            self._kept.append(reply)
            self.seconds[client] = reply.seconds
            yield ClientResult(client=client, update=work.update(reply), checked=True, lasting=True)

    def close(self) -> None:
        """Ends all processes of all sites; without effect on an engine that is not open."""
        self._let_go()
        if self._runner is not None:
            runner, self._runner = self._runner, None
            runner.close()

    def keep_logs(self, folder: Path) -> None:
        """Writes what each site writes to a file in a folder.

        Raises:
            StorageError: That cannot be written.
        """
        self._opened().keep_logs(folder)

    def finish(self) -> None:
        """Tells the sites that the federation is over, and waits for their scripts to end by themselves."""
        self._opened().finish()

    def measure(self, learner: Learner, model: ModelState, round: int) -> dict[int, tuple[float, Mapping[str, float]]]:
        """Has the sites that can measure a model; returns each one's number of examples and means, by client.

        Args:
            learner: Knows the names of the model's arrays.
            model: The global model.
            round: Whose model it is.

        Raises:
            SiteError: A site failed, and the policy is to stop.
        """
        self._let_go()
        runner = self._opened()
        work = self._task("evaluate", Broadcast(round=round, model=model), learner, seed=0)
        return {
            client: (reply.examples, reply.metrics)
            for client, reply, _ in runner.gather(work, runner.evaluators())
            if reply is not None
        }

    def _let_go(self) -> None:
        """Frees the memory in which the sites' updates of the last round lie."""
        while self._kept:
            self._kept.pop().close()

    def _opened(self) -> SiteRunner:
        if self._runner is None:
            raise ConfigurationError("engine 'sites' is not open")
        return self._runner

    def _task(self, kind: str, broadcast: Broadcast, learner: Learner, *, seed: int) -> SiteTask:
        if self._ties is None:
            self._ties = ties_at_server(learner, broadcast.model)
        return SiteTask(kind, broadcast, ties=self._ties, seed=seed)
