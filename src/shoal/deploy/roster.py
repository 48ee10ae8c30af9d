"""Which sites are there: their names, their addresses, and which client of the federation each one is."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.deploy.answer import Answer
from shoal.deploy.parcel import Parcel
from shoal.deploy.wire import Wire
from shoal.errors import ConfigurationError

logger = logging.getLogger("shoal")

CENSUS = 1.0
"""Seconds between two looks at who is there."""

AGAIN = 30.0
"""Seconds after which an address that gave no name is asked again."""


@dataclass
class Member:
    """A site, as the server knows it."""

    name: str
    """Its own."""
    address: str | None = None
    """Where it is; None while it is not there."""
    since: float = 0.0
    """When it came, or went."""
    evaluates: bool = False
    """Whether it says that it can measure a model."""
    failures: int = 0
    """How often in the run it has said that it failed."""


class Roster:
    """Keeps the addresses of the sites up to date: each address is asked once for the name of its site.

    Args:
        wire: Leads to the addresses.
        hello: What to ask with, as JSON.
        names: The sites of the federation; None to take the names of those that come.
    """

    def __init__(self, wire: Wire, hello: Mapping[str, object], names: Sequence[str] | None) -> None:
        self._wire = wire
        self._hello = Parcel(meta=hello)
        self._names = names
        self._begun = False
        self.members: dict[str, Member] = {name: Member(name) for name in names or ()}
        """The sites by name."""
        self._asked: dict[str, tuple[str, float]] = {}  # ticket and time by address
        self._known: dict[str, str] = {}
        self._strange: set[str] = set()
        self._looked = 0.0

    @property
    def present(self) -> list[str]:
        """The names of the sites that are there."""
        return [name for name, member in self.members.items() if member.address is not None]

    def look(self) -> None:
        """Sees who has come and who has gone; without effect a moment after the last look."""
        now = time.monotonic()
        if now - self._looked < CENSUS:
            return
        self._looked = now
        there = set(self._wire.present())
        for address in [one for one in self._known if one not in there]:
            member = self.members[self._known.pop(address)]
            if member.address == address:
                logger.warning("%s is gone", member.name)
                member.address, member.since = None, now
        for address in [one for one in self._asked if one not in there]:
            self._wire.forget([self._asked.pop(address)[0]])
        self._strange &= there
        ask = [one for one in there - self._known.keys() - self._strange if self._due(one, now)]
        if ask:
            self._wire.forget([self._asked[one][0] for one in ask if one in self._asked])
            self._asked |= {address: (ticket, now) for address, ticket in self._wire.send(ask, self._hello).items()}

    def begin(self, names: Sequence[str]) -> None:
        """Says which sites the federation has: it has begun, and nobody who comes later is to disturb it."""
        self._names, self._begun = names, True
        self.members |= {name: Member(name) for name in names if name not in self.members}

    def take(self, ticket: str, answer: Parcel | Exception) -> bool:
        """Takes the answer to a hello; returns whether it is one.

        Raises:
            ConfigurationError: A site will not take part, and the federation has not begun.
        """
        address = next((one for one, (asked, _) in self._asked.items() if asked == ticket), None)
        if address is None:
            return False
        if isinstance(answer, Exception):
            return True  # it is asked again
        try:
            said = Answer.from_json(answer.meta)
        except ValueError as error:
            self._refused(f"what {address} answers cannot be read: {error}", address)
            return True
        if said.refused and not self._wants(said.site):
            self._ignore(address, f"site {said.site or address} is there, and has no part in this federation")
        elif said.refused:
            self._refused(f"{said.site or address} refuses: {said.error}", address)
        elif said.error:
            logger.warning("%s: %s", said.site or address, said.error)
        elif not said.site:
            self._refused(f"{address} says no name of a site", address)
        else:
            self._welcome(said.site, address)
        return True

    def _welcome(self, name: str, address: str) -> None:
        if not self._wants(name):
            names = ", ".join(self._names or ())
            self._ignore(address, f"site {name} is there, and has no part in this federation of {names}")
            return
        member = self.members.setdefault(name, Member(name))
        if member.address is not None and member.address != address:
            twice = f"two sites are called {name}: give each a name of its own in its site.toml"
            if not self._begun:
                raise ConfigurationError(twice)
            # Its client may have come back before the wire knows that it was gone: it is asked again.
            logger.warning("%s; the second one is left out while the first is there", twice)
            return
        del self._asked[address]
        member.address, member.since = address, time.monotonic()
        self._known[address] = name
        logger.info("%s is there", name)

    def _refused(self, why: str, address: str) -> None:
        """Stops a federation that has not begun, or ignores an address."""
        if not self._begun:
            raise ConfigurationError(why)
        self._ignore(address, why)

    def _ignore(self, address: str, why: str) -> None:
        logger.warning("%s", why)
        self._asked.pop(address, None)
        self._strange.add(address)

    def _wants(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _due(self, address: str, now: float) -> bool:
        return address not in self._asked or now - self._asked[address][1] > AGAIN


def in_order(names: Sequence[str]) -> list[str]:
    """Returns names in the order that a reader expects: ``site-2`` before ``site-10``."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
