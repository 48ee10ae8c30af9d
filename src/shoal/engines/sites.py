"""Engine ``sites``: processes on this machine that are launched, watched and federated like real sites."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from shoal.data import Population
from shoal.engine import ClientResult, ClientTask
from shoal.engines.site_task import SiteTask
from shoal.errors import ClientError, ConfigurationError, SiteError
from shoal.learners.base import Learner
from shoal.processes.memory import give_large_memory_back
from shoal.sites.allotment import Allotment
from shoal.sites.hub import Hub
from shoal.sites.log import SiteLog
from shoal.sites.process import Launcher, Starter
from shoal.sites.shutdown import finish_sites, stop_sites
from shoal.sites.spec import Site
from shoal.sites.state import ON_ITS_WAY, Deadlines, Failure, Reply, SiteState
from shoal.types import Broadcast, ModelState

logger = logging.getLogger("shoal")

LOOK = 0.2
"""Seconds between two looks at the sites' health."""

WHERE = 2.0
"""Seconds in which the ranks of a site that is late tell where they are."""

OnFailure = Literal["stop", "continue", "restart"]


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What to do about sites that fail, or are slow."""

    on_failure: OnFailure = "stop"
    """``stop`` the run; ``continue`` without the site; or ``restart`` it, from the current global model."""
    max_restarts: int = 1
    """How often one site is started again; one more failure stops the run."""
    min_sites: int = 1
    """With how many replies a round may go on, where sites are late or have left."""
    deadline: float | None = None
    """Seconds after which a round goes on without the sites that have not replied; None to wait for all."""
    waits: Deadlines = field(default_factory=Deadlines)
    """After which times a site counts as failed."""


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
        self._hub: Hub | None = None
        self._states: dict[str, SiteState] = {}
        self._logs: dict[str, SiteLog] = {}
        self._launchers: list[Launcher] = []
        self._kept: list[Reply] = []
        self._number = 0
        self._round = 0

    def open(self, learner: Learner, clients: Population) -> None:  # noqa: ARG002 - the sites have their own data
        """Starts all sites; their ranks stay until :meth:`close`.

        Raises:
            ConfigurationError: A site cannot be started, or there are too few devices.
        """
        learner.preload()
        give_large_memory_back()
        environments = self.allotment.environments(self.sites)
        self._states = {site.name: SiteState(site=site) for site in self.sites}
        self._logs = {}
        self._hub = hub = Hub(self._states)
        try:
            for site, env in zip(self.sites, environments, strict=True):
                self._launchers.append(self.starter(hub.address, site, env))
            for site, launcher in zip(self.sites, self._launchers, strict=True):
                log = self._logs[site.name] = SiteLog(site.name, all_shown=self.verbose)
                log.follow(launcher.output)
            self._launch_all(hub)
        except BaseException:
            for launcher in self._launchers[len(self._logs) :]:  # nobody reads what these write
                launcher.output.close()
            self.close()
            raise

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Yields what each site replies, as the replies come."""
        self._round = broadcast.round
        self._let_go()
        work = SiteTask("train", broadcast, learner, seed=tasks[0].seed if tasks else 0)
        for client, reply, problem in self._gather(work, [task.client for task in tasks]):
            if reply is None:
                yield ClientResult(client=client, error=problem)
                continue
            self._kept.append(reply)
            yield ClientResult(client=client, update=work.update(reply), checked=True, lasting=True)

    def close(self) -> None:
        """Ends all processes of all sites; without effect on an engine that is not open."""
        self._let_go()
        if self._hub is None:
            return
        hub, self._hub = self._hub, None
        try:
            stop_sites(hub, list(self._states.values()), [launcher.pid for launcher in self._launchers])
        finally:
            hub.close()
            while self._launchers:
                self._launchers.pop().reap()
            for log in self._logs.values():
                log.close(within=2.0)

    def keep_logs(self, folder: Path) -> None:
        """Writes what each site writes to a file in a folder.

        Raises:
            StorageError: That cannot be written.
        """
        for name, log in self._logs.items():
            log.keep(folder / f"{name}.log")

    def finish(self) -> None:
        """Tells the sites that the federation is over, and waits for their scripts to end by themselves."""
        waits = self.policy.waits.finish
        for state in finish_sites(self._opened(), list(self._states.values()), within=waits):
            why = state.failure.what if state.failure else f"its script did not end within {waits:g} s and was ended"
            logger.warning("after the last round, %s: %s", state.site.name, why)

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
        clients = [index for index, site in enumerate(self.sites) if self._states[site.name].evaluates]
        work = SiteTask("evaluate", Broadcast(round=round, model=model), learner, seed=0)
        return {
            client: (reply.examples, reply.metrics)
            for client, reply, _ in self._gather(work, clients)
            if reply is not None
        }

    def _let_go(self) -> None:
        """Frees the memory in which the sites' updates of the last round lie."""
        while self._kept:
            self._kept.pop().close()

    def _gather(self, work: SiteTask, clients: Sequence[int]) -> Iterator[tuple[int, Reply | None, Exception | None]]:
        """Gives a task to sites, and yields each one's reply, or why there is none."""
        hub = self._opened()
        self._number += 1
        work.write(self._number)
        waiting = {client: self._states[self.sites[client].name] for client in clients}
        ends: float | None = None
        replies = 0
        try:
            for client in [client for client, state in waiting.items() if state.out is not None]:
                yield client, None, waiting.pop(client).out
            while waiting:
                self._hand_out(work, waiting)
                hub.poll(LOOK)
                for client, problem in self._look_at_all():
                    if waiting.pop(client, None) is not None:
                        yield client, None, problem
                for client, state in list(waiting.items()):
                    if (reply := self._taken(state, work)) is not None:
                        del waiting[client]
                        replies += 1
                        yield client, reply, None
                if ends is None and self.policy.deadline is not None and self._all_started(waiting):
                    ends = time.monotonic() + self.policy.deadline
                if ends is not None and time.monotonic() > ends and replies >= self.policy.min_sites:
                    for client in list(waiting):
                        del waiting[client]
                        late = f"no reply within {self.policy.deadline:g} s; what it sends later is thrown away"
                        yield client, None, ClientError(late)
        finally:
            work.close()

    def _hand_out(self, work: SiteTask, waiting: Mapping[int, SiteState]) -> None:
        """Gives the task to those whose ranks have all asked for one, so that they go through their tasks together."""
        for client, state in waiting.items():
            if state.task == self._number or not state.ready:
                continue
            if not state.idle:
                state.expect()
                continue
            state.drop_reply()
            state.begin(self._number)
            for connection in state.ranks.values():
                connection.does(ON_ITS_WAY)
                connection.post({"task": work.message(client) | {"rounds": self.rounds}}, work.fd)

    @staticmethod
    def _all_started(waiting: Mapping[int, SiteState]) -> bool:
        """Tells whether all sites have once asked for a task: a start takes its time, and no round's."""
        for state in waiting.values():
            state.started = state.started or state.ready or state.task is not None
        return all(state.started for state in waiting.values())

    def _taken(self, state: SiteState, work: SiteTask) -> Reply | None:
        """Returns a site's reply, if it is there and can be used; else notes what is wrong with it."""
        reply = state.reply
        if reply is None or reply.task != self._number:
            return None
        if problem := work.problem(reply):
            state.failure = Failure(what=problem, rank=0)
            return None
        state.reply, state.task = None, None
        return reply

    def _look_at_all(self) -> Iterator[tuple[int, SiteError]]:
        """Looks after all sites; yields those that are left out from now on, and why.

        Raises:
            SiteError: The policy is to stop.
        """
        for client, site in enumerate(self.sites):
            state = self._states[site.name]
            if state.out is None and (trouble := state.trouble(self.policy.waits, time.monotonic())):
                error = self._deal_with(state, trouble)
                if error is not None:
                    yield client, error

    def _deal_with(self, state: SiteState, trouble: Failure) -> SiteError | None:
        """Does what the policy says about a site in trouble; returns the reason if it is left out."""
        if trouble.silent:
            trouble = replace(trouble, what="; ".join(filter(None, (trouble.what, self._whereabouts(state)))))
        error = self._error(state, trouble)
        for connection in state.ranks.values():
            connection.kill()
        if self.policy.on_failure == "restart" and state.attempt < self.policy.max_restarts:
            logger.warning(
                "%s; starting it again (%d of at most %d)", error, state.attempt + 1, self.policy.max_restarts
            )
            self._restart(state)
            return None
        left = sum(other.out is None for other in self._states.values()) - 1
        if self.policy.on_failure != "continue":
            raise error
        if left < self.policy.min_sites:
            raise SiteError(f"{error}; {left} sites are left, and min_sites={self.policy.min_sites}") from error
        state.out = error
        self._dismiss(state)
        return error

    def _error(self, state: SiteState, trouble: Failure) -> SiteError:
        log = self._logs.get(state.site.name)
        time.sleep(LOOK)  # for its last lines to come
        lines = (log.last(trouble.rank) if log else ()) or trouble.lines or (log.last(None) if log else ())
        where = f" in round {self._round}" if self._round else " before the first round"
        error = SiteError(f"{state.site.name}: {trouble.what}{where}")
        if lines:
            kept = f" ({log.path})" if log and log.path else ""
            of = "its launcher" if trouble.rank is None else f"rank {trouble.rank}"
            told = "\n".join(f"  {line}" for line in lines)
            error.add_note(f"the last lines of {of} of {state.site.name}{kept}:\n{told}")
        return error

    def _whereabouts(self, state: SiteState) -> str:
        """Asks the ranks of a site, which is to be ended, at which line of their script they are."""
        for connection in state.ranks.values():
            connection.post({"where": True})
        until = time.monotonic() + WHERE
        while time.monotonic() < until and not all(rank.where for rank in state.ranks.values()):
            self._opened().poll(LOOK)
        told = ((rank, each.where or "no line that it can tell") for rank, each in sorted(state.ranks.items()))
        return ", ".join(f"rank {rank} is at {where}" for rank, where in told)

    def _restart(self, state: SiteState) -> None:
        hub = self._opened()
        for connection in state.ranks.values():
            hub.forget(connection)
        if state.agent is None or state.agent.gone:
            raise SiteError(f"{state.site.name}: its launcher is gone, so its ranks cannot be started again")
        state.begin_attempt()
        state.agent.post({"launch": state.attempt})

    def _dismiss(self, state: SiteState) -> None:
        hub = self._opened()
        state.drop_reply()
        for connection in state.ranks.values():
            hub.forget(connection)
        state.ranks.clear()
        if state.agent is not None and not state.agent.gone:
            state.agent.post({"stop": True})

    def _launch_all(self, hub: Hub) -> None:
        """Waits for the launchers, and has each start its ranks."""
        until = time.monotonic() + self.policy.waits.start
        missing = list(self._states.values())
        while missing:
            hub.poll(LOOK)
            for state in [one for one in missing if one.agent is not None and not one.agent.gone]:
                missing.remove(state)
                state.since = time.monotonic()
                if state.agent is not None:
                    state.agent.post({"launch": 0})
            for state in missing:
                log = self._logs[state.site.name]
                if log.ended or time.monotonic() > until:
                    how = "ended at once" if log.ended else f"did not come within {self.policy.waits.start:g} s"
                    raise self._error(state, Failure(what=f"its launcher {how}"))

    def _opened(self) -> Hub:
        if self._hub is None:
            raise ConfigurationError("engine 'sites' is not open")
        return self._hub
