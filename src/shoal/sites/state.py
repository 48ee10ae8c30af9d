"""What the server knows of one site: who of it is there, what it works at, what it said, and what is wrong with it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoal.errors import SiteError
from shoal.processes.table import Standing, standing
from shoal.processes.tensors import TensorFile
from shoal.sites.connection import LEFT, Connection
from shoal.sites.spec import Site

NEWS = 10.0
"""Seconds in which a site's launcher should tell how a rank ended whose connection is closed, on a busy machine too."""

PATIENCE = 5.0
"""How many times longer a rank may be silent that is seen to compute: long work in C keeps Python from its threads."""

EARLY = "left its loop over the tasks before they ended"

WAITING = "waiting"
"""What a rank does that has asked for a task."""

ON_ITS_WAY = "going to its next task"
"""What a rank does that was given a task and has not said that it has it."""


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long the server waits, in seconds."""

    start: float = 300.0
    """For all ranks of a site to start and to ask for a first task."""
    reply: float = 3600.0
    """For the reply to a task: more than the longest round takes."""
    silence: float = 8.0
    """For a sign of life of a rank, of which one comes every second."""
    finish: float = 60.0
    """For the scripts to end, once the federation has."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong at a site."""

    what: str
    """In words, without the site's name."""
    rank: int | None = None
    """Which rank it was, if one is to blame."""
    lines: Sequence[str] = ()
    """What that wrote last."""
    by_others: bool = False
    """Whether it only follows from the end of another rank."""
    silent: bool = False
    """Whether it is only that nothing came, though the ranks live and could be asked."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a site answers to a task."""

    task: int
    """The task's number."""
    examples: float
    """How many examples it is about."""
    metrics: Mapping[str, float]
    """Means over them."""
    tree: str
    """What the file holds: ``params``, ``delta``, or nothing."""
    file: TensorFile | None
    """The arrays; the receiver closes it."""
    seconds: float = 0.0
    """How long the site's rank 0 worked at the task, from having it to its reply."""

    def close(self) -> None:
        """Lets go of the arrays."""
        if self.file is not None:
            self.file.close()


@dataclass(kw_only=True)
class SiteState:
    """One site, as the server sees it."""

    site: Site
    """As the user wrote it."""
    attempt: int = 0
    """How often it was started again."""
    agent: Connection | None = None
    """The connection to its launcher."""
    ranks: dict[int, Connection] = field(default_factory=dict)
    """Those to its ranks."""
    started: bool = False
    """Whether all of its ranks have once asked for a task."""
    evaluates: bool = False
    """Whether its script says that it can evaluate."""
    task: int | None = None
    """The number of the task that it works at."""
    since: float = field(default_factory=time.monotonic)
    """When it was given that, or should have come for it, or was started."""
    expected: bool = False
    """Whether there is a task for it that some rank has not come for."""
    reply: Reply | None = None
    """Its answer, until the engine takes it."""
    failure: Failure | None = None
    """What its launcher, or a rank, says is wrong."""
    ended: bool = False
    """Whether its launcher says that all ranks have ended, as they should once the federation is over."""
    out: SiteError | None = None
    """Why it takes no part any more; None while it does."""
    _looks: dict[int, tuple[float, Standing]] = field(default_factory=dict)

    @property
    def present(self) -> bool:
        """Whether all of its ranks have come."""
        return len(self.ranks) == self.site.ranks

    @property
    def ready(self) -> bool:
        """Whether all of its ranks have asked for a first task."""
        return self.present and not any(rank.gone or rank.doing in ("starting", LEFT) for rank in self.ranks.values())

    @property
    def idle(self) -> bool:
        """Whether all of its ranks wait for a task."""
        return all(rank.doing == WAITING for rank in self.ranks.values())

    def begin(self, task: int) -> None:
        """Takes note that all ranks are given a task."""
        self.task, self.since, self.expected = task, time.monotonic(), False

    def expect(self) -> None:
        """Takes note that there is a task for it, while some rank is still at what came before."""
        if self.task is None and not self.expected:
            self.since, self.expected = time.monotonic(), True

    def trouble(self, deadlines: Deadlines, now: float) -> Failure | None:
        """Returns what is wrong with the site; None where all is well."""
        if self.failure is not None:
            left = next((rank for rank, each in sorted(self.ranks.items()) if each.doing == LEFT), None)
            if left is None or not self.failure.by_others:
                return self.failure
            return Failure(what=f"rank {left} (process {self.ranks[left].pid}) {EARLY}", rank=left)
        if self.agent is not None and self.agent.gone and not self.ended:
            return Failure(what=f"its launcher (process {self.agent.pid}) has ended")
        if self.ended:
            return Failure(what="its script ended before the federation did: it must go on until its tasks end")
        for number, rank in sorted(self.ranks.items()):
            if found := self._trouble_of(number, rank, deadlines, now):
                return Failure(what=f"rank {number} (process {rank.pid}) {found}", rank=number)
        return self._late(deadlines, now)

    def _trouble_of(self, number: int, rank: Connection, deadlines: Deadlines, now: float) -> str | None:
        if rank.gone or rank.doing == LEFT:
            if now - rank.changed < NEWS:  # how it ended is not yet known
                return None
            return "ended before the federation did" if rank.gone else EARLY
        if now - rank.heard > deadlines.silence:
            return self._silent(number, rank, deadlines, now)
        self._looks.pop(number, None)
        return None

    def _silent(self, number: int, rank: Connection, deadlines: Deadlines, now: float) -> str | None:
        """Tells a rank that is stopped or stuck from one whose Python is kept from its threads by long work in C."""
        found = standing(rank.pid)
        if found is None or found.state in "TtZX":
            return "was stopped, as by SIGSTOP" if found and found.state in "Tt" else "is gone"
        before = self._looks.get(number)
        if before is None or found.ticks > before[1].ticks or found.state == "R":  # or waits for its turn to compute
            self._looks[number] = (now, found)
            if now - rank.heard < PATIENCE * deadlines.silence:
                return None
        elif now - before[0] < deadlines.silence / 4:
            return None
        return f"has given no sign of life for {now - rank.heard:.0f} s"

    def _late(self, deadlines: Deadlines, now: float) -> Failure | None:
        if missing := [str(rank) for rank in range(self.site.ranks) if self._doing(rank) == "starting"]:
            if now - self.since > deadlines.start:
                return Failure(
                    silent=True,
                    what=f"rank {', '.join(missing)} did not ask for a task within {deadlines.start:g} s of its start",
                )
        elif not self.ready:  # a rank is gone, and how it ended is not yet known
            return None
        elif (self.task is not None or self.expected) and self.reply is None and now - self.since > deadlines.reply:
            slow = next((rank for rank, each in sorted(self.ranks.items()) if self._holds_up(each)), 0)
            what = "did not come for its next task" if self.expected else "gave no reply"
            return Failure(what=f"{what} within {deadlines.reply:g} s", rank=slow, silent=True)
        return None

    def _holds_up(self, rank: Connection) -> bool:
        return rank.doing != WAITING if self.expected else rank.doing == ON_ITS_WAY

    def _doing(self, rank: int) -> str:
        return self.ranks[rank].doing if rank in self.ranks else "starting"

    def begin_attempt(self) -> None:
        """Forgets all that the site's processes were and said, before they are started again."""
        self.attempt += 1
        self.ranks.clear()
        self._looks.clear()
        self.drop_reply()
        self.failure, self.ended, self.task, self.expected = None, False, None, False
        self.since = time.monotonic()

    def drop_reply(self) -> None:
        """Lets go of an answer that nobody takes."""
        if self.reply is not None:
            self.reply.close()
        self.reply = None
