"""One request to several sites, and what becomes of it at each: answers, failures, silence."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shoal.deploy.answer import Answer
from shoal.deploy.parcel import Parcel
from shoal.deploy.roster import Roster
from shoal.deploy.wire import Wire
from shoal.errors import ClientError, ConfigurationError, EngineError, SiteError
from shoal.sites.policy import SitePolicy

logger = logging.getLogger("shoal")

LOOK = 0.25
"""Seconds between two looks at the sites."""

AGAIN = 60.0
"""Seconds after which a site that has not answered is asked once more, in case that either message was lost: it works
at the task only once. Then after twice as many, and so on."""

BUSY = 10.0
"""Seconds after which a site is asked again that works for another run."""

Outcome = tuple[int, Parcel | None, Exception | None]
"""A client, and its answer or why there is none."""


@dataclass
class _Asked:
    """One site that was asked."""

    client: int
    ticket: str | None = None
    """Of the last message to it."""
    address: str | None = None
    """Where that went."""
    next: float = 0.0
    """When it is asked again."""
    pause: float = AGAIN
    """Seconds from one message to the next."""
    lost: int = 0
    """How many messages to it were lost one after the other."""
    lost_since: float = 0.0
    """When the first of those was."""
    lost_last: float = 0.0
    """When the last one was."""
    said: str = ""
    """What it said last that was no answer."""


@dataclass
class Asking:
    """Asks sites, again where a message may be lost, and judges those that do not answer.

    Args:
        wire: Leads to them.
        roster: Knows which are there.
        parcel: The request.
        sites: The clients that are asked, by the sites' names.
        number: The request's.
        policy: What to do about failures.
        within: Seconds in which a site must answer.
        lenient: Whether some may be left out.
    """

    wire: Wire
    roster: Roster
    parcel: Parcel
    sites: Mapping[str, int]
    number: int
    policy: SitePolicy
    within: float
    lenient: bool
    _waiting: dict[str, _Asked] = field(default_factory=dict)

    def answers(self) -> Iterator[Outcome]:
        """Yields each site's answer, or why there is none.

        Raises:
            ConfigurationError: A site refuses to take part in a run that has not begun.
            SiteError: A site failed, and the policy is to stop.
            EngineError: What carries the messages is gone.
        """
        self._waiting = {name: _Asked(client) for name, client in self.sites.items()}
        started = time.monotonic()
        replies = 0
        try:
            while self._waiting:
                self._send()
                for ticket, answer in self.wire.receive(LOOK):
                    for outcome in self._taken(ticket, answer):
                        replies += outcome[1] is not None
                        yield outcome
                self.roster.look()
                for outcome in self._judged(started, replies):
                    yield outcome
        finally:
            self.wire.forget([asked.ticket for asked in self._waiting.values() if asked.ticket is not None])

    def _send(self) -> None:
        """Asks those that are there and due."""
        now = time.monotonic()
        due = {}
        for name, asked in self._waiting.items():
            address = self.roster.members[name].address
            if address is not None and (now >= asked.next or address != asked.address):
                due[address] = asked
        if not due:
            return
        self.wire.forget([asked.ticket for asked in due.values() if asked.ticket is not None])
        for address, ticket in self.wire.send(list(due), self.parcel).items():
            asked = due[address]
            asked.ticket, asked.address, asked.next = ticket, address, now + asked.pause
            asked.pause *= 2

    def _taken(self, ticket: str, answer: Parcel | Exception) -> Iterator[Outcome]:
        """Takes what came; yields an outcome if that settles a site."""
        name = next((name for name, asked in self._waiting.items() if asked.ticket == ticket), None)
        if name is None:
            self.roster.take(ticket, answer)
            return
        asked = self._waiting[name]
        asked.ticket, asked.pause = None, AGAIN  # ever longer is for silence alone
        if isinstance(answer, Exception):  # the message or its answer was lost on the way
            self._lost(name, asked, answer)
            return
        try:
            said = Answer.from_json(answer.meta)
        except ValueError as error:
            said = Answer(site=name, number=self.number, error=f"its answer cannot be read: {error}")
        if said.away:
            self._lost(name, asked, EngineError(said.error))
            return
        asked.lost = 0
        if not said.error:
            if said.number == self.number:
                yield self._waiting.pop(name).client, answer, None
            return
        if said.busy:
            asked.said = said.error
            asked.next = time.monotonic() + BUSY
            return
        yield from self._failed(name, asked, said)

    def _lost(self, name: str, asked: _Asked, error: Exception) -> None:
        """Takes note that a message did not get through, or its answer."""
        now = time.monotonic()
        if now - asked.lost_last > 3 * BUSY:
            asked.lost, asked.lost_since = 0, now
        asked.lost, asked.lost_last = asked.lost + 1, now
        asked.said = str(error)
        asked.next = min(asked.next, now + BUSY)
        logger.warning("%s: %s", name, error)

    def _failed(self, name: str, asked: _Asked, said: Answer) -> Iterator[Outcome]:
        """Deals with a site that says that it failed, as the policy says.

        Raises:
            ConfigurationError: It refuses to take part in the run, which has not begun.
            SiteError: It failed, and the policy is to stop.
        """
        if said.refused:
            why = f"{name} refuses: {said.error}"
            if self.parcel.meta.get("kind") == "hello":
                raise ConfigurationError(why)
            # To ask again is of no use; and one site is not to end the run of all where they may go on without it.
            yield self._left_out(name, SiteError(why))
            return
        error = SiteError(f"{name}: {said.error.removeprefix(f'{name}: ')}")
        member = self.roster.members[name]
        member.failures += 1  # in all rounds together
        if self.policy.on_failure == "restart" and member.failures <= self.policy.max_restarts:
            logger.warning("%s; asking it again (%d of at most %d)", error, member.failures, self.policy.max_restarts)
            asked.next = 0.0
        else:
            yield self._left_out(name, error)

    def _left_out(self, name: str, error: SiteError) -> Outcome:
        """Leaves a site out that failed, if the policy allows for it.

        Raises:
            SiteError: It does not.
        """
        if self.policy.on_failure != "continue" or not self.lenient:
            raise error
        return self._dropped(name), None, error

    def _dropped(self, name: str) -> int:
        """Waits for a site no more; returns its client."""
        asked = self._waiting.pop(name)
        if asked.ticket is not None:
            self.wire.forget([asked.ticket])
        return asked.client

    def _judged(self, started: float, replies: int) -> Iterator[Outcome]:
        """Yields the sites that are left out from this round.

        Raises:
            SiteError: One is missing that may not be left out.
        """
        now = time.monotonic()
        passed = now - started
        enough = self.lenient and replies >= self.policy.min_sites
        late = self.policy.deadline is not None and passed > self.policy.deadline
        for name, asked in list(self._waiting.items()):
            gone = self._gone_since(name, asked, started)
            if enough and (late or gone is not None):
                why = f"no reply within {self.policy.deadline:g} s" if gone is None else "it is gone"
                yield self._dropped(name), None, ClientError(f"{why}; what it sends later is thrown away")
            elif gone is not None and now - gone > self.policy.waits.start:
                what = f"is gone, and did not come back within {self.policy.waits.start:g} s"
                yield self._left_out(name, SiteError(f"{name} {what}{_last(asked)}"))
            elif passed > self.within + (self.policy.waits.start if asked.said else 0.0):
                yield self._left_out(name, SiteError(f"{name} gave no answer within {self.within:g} s{_last(asked)}"))

    def _gone_since(self, name: str, asked: _Asked, started: float) -> float | None:
        """Returns since when a site is gone; None while it is there.

        It is, too, where what carries the messages is there and its own process is not: one message may be lost on the
        way, and not two in a row.
        """
        member = self.roster.members[name]
        if member.address is None:
            return max(member.since, started)
        lost = asked.lost > 1 and time.monotonic() - asked.lost_last < 3 * BUSY
        return asked.lost_since if lost else None


def _last(asked: _Asked) -> str:
    return f"; last was said: {asked.said}" if asked.said else ""
