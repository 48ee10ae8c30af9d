"""The runner of sites: launches their processes, gives them tasks, watches them, and ends them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shoal.errors import ClientError, ConfigurationError, SiteError
from shoal.processes.memory import give_large_memory_back
from shoal.sites.allotment import Allotment
from shoal.sites.hub import Hub
from shoal.sites.log import SiteLog
from shoal.sites.policy import SitePolicy
from shoal.sites.process import Launcher, Starter
from shoal.sites.shutdown import finish_sites, stop_sites
from shoal.sites.spec import Site
from shoal.sites.state import ON_ITS_WAY, Failure, Reply, SiteState
from shoal.sites.task import SiteTask

logger = logging.getLogger("shoal")

LOOK = 0.2
"""Seconds between two looks at the sites' health."""

WHERE = 2.0
"""Seconds in which the ranks of a site that is late tell where they are."""


class SiteRunner:
    """Runs sites on this machine, from :meth:`open` to :meth:`close`: their ranks stay from task to task.

    Args:
        sites: What they are.
        starter: Starts a site's launcher.
        allotment: Which devices each site has.
        policy: What to do about failures.
        verbose: Whether to show what all ranks write, and not only each site's rank 0.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        starter: Starter,
        allotment: Allotment,
        policy: SitePolicy,
        *,
        verbose: bool = False,
    ) -> None:
        self.sites = sites
        self._starter = starter
        self._allotment = allotment
        self._policy = policy
        self._verbose = verbose
        self._hub: Hub | None = None
        self._states: dict[str, SiteState] = {}
        self._logs: dict[str, SiteLog] = {}
        self._launchers: list[Launcher] = []
        self._number = 0
        self._round = 0
        self.rounds = 0
        """How many rounds the federation has, which the sites are told."""

    def open(self) -> None:
        """Starts all sites.

        Raises:
            ConfigurationError: A site cannot be started, or there are too few devices.
        """
        give_large_memory_back()
        environments = self._allotment.environments(self.sites)
        self._states = {site.name: SiteState(site=site) for site in self.sites}
        self._logs = {}
        self._hub = hub = Hub(self._states)
        try:
            for site, env in zip(self.sites, environments, strict=True):
                self._launchers.append(self._starter(hub.address, site, env))
            for site, launcher in zip(self.sites, self._launchers, strict=True):
                log = self._logs[site.name] = SiteLog(site.name, all_shown=self._verbose)
                log.follow(launcher.output)
            self._launch_all(hub)
        except BaseException:
            for launcher in self._launchers[len(self._logs) :]:  # nobody reads what these write
                launcher.output.close()
            self.close()
            raise

    def close(self) -> None:
        """Ends all processes of all sites; without effect on a runner that is not open."""
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
        waits = self._policy.waits.finish
        for state in finish_sites(self._opened(), list(self._states.values()), within=waits):
            why = state.failure.what if state.failure else f"its script did not end within {waits:g} s and was ended"
            logger.warning("after the last round, %s: %s", state.site.name, why)

    def tend(self, seconds: float = 0.0) -> None:
        """Hears what the sites' processes say between tasks, and does what the policy says about those in trouble.

        Args:
            seconds: How long to wait for a first word.

        Raises:
            SiteError: A site failed, and the policy is to stop.
        """
        self._opened().poll(seconds)
        list(self._look_at_all())

    def wait_until_ready(self) -> None:
        """Waits until all ranks of all sites have asked for a first task, or the policy's time for that is over.

        Raises:
            SiteError: A site failed, and the policy is to stop.
        """
        while not all(state.ready or state.out for state in self._states.values()):
            self.tend(LOOK)

    def evaluators(self) -> list[int]:
        """Returns the places of the sites that say that they can measure a model."""
        return [index for index, site in enumerate(self.sites) if self._states[site.name].evaluates]

    def gather(self, work: SiteTask, clients: Sequence[int]) -> Iterator[tuple[int, Reply | None, Exception | None]]:
        """Gives a task to sites, and yields each one's reply, which is the caller's to close, or why there is none.

        Args:
            work: The task.
            clients: The sites' places.

        Raises:
            SiteError: A site failed, and the policy is to stop.
        """
        hub = self._opened()
        self._round = work.broadcast.round
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
                if ends is None and self._policy.deadline is not None and self._all_started(waiting):
                    ends = time.monotonic() + self._policy.deadline
                if ends is not None and time.monotonic() > ends and replies >= self._policy.min_sites:
                    for client in list(waiting):
                        del waiting[client]
                        late = f"no reply within {self._policy.deadline:g} s; what it sends later is thrown away"
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
            if state.out is None and (trouble := state.trouble(self._policy.waits, time.monotonic())):
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
        if self._policy.on_failure == "restart" and state.attempt < self._policy.max_restarts:
            logger.warning(
                "%s; starting it again (%d of at most %d)", error, state.attempt + 1, self._policy.max_restarts
            )
            self._restart(state)
            return None
        left = sum(other.out is None for other in self._states.values()) - 1
        if self._policy.on_failure != "continue":
            raise error
        if left < self._policy.min_sites:
            raise SiteError(f"{error}; {left} sites are left, and min_sites={self._policy.min_sites}") from error
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
        until = time.monotonic() + self._policy.waits.start
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
                    how = "ended at once" if log.ended else f"did not come within {self._policy.waits.start:g} s"
                    raise self._error(state, Failure(what=f"its launcher {how}"))

    def _opened(self) -> Hub:
        if self._hub is None:
            raise ConfigurationError("the sites were not started")
        return self._hub
