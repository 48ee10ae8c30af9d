"""How the server's messages get to the sites: what Flower and NVFlare each do in their own way."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from shoal.deploy.parcel import Parcel


class Wire(Protocol):
    """Carries parcels to the processes that stand for sites, and their answers back.

    One thread calls it. Nothing waits longer than it is told to.
    """

    name: str
    """What messages call it, such as ``flower``."""

    def present(self) -> Collection[str]:
        """Returns the addresses that parcels can be sent to now."""
        ...  # pragma: no cover

    def send(self, to: Sequence[str], parcel: Parcel) -> Mapping[str, str]:
        """Sends a parcel to several addresses; returns the ticket of each.

        An address that cannot be reached gets a ticket too, of which an error comes, or nothing.

        Raises:
            EngineError: The engine itself is gone, or has ended the run.
        """
        ...  # pragma: no cover

    def receive(self, seconds: float) -> Iterator[tuple[str, Parcel | Exception]]:
        """Yields the tickets whose answers have come, each with its answer or with what went wrong.

        It waits for the first one at most so long, and reads an answer only when it is asked for, so that one model at
        a time is in memory.

        Raises:
            EngineError: The engine itself is gone, or has ended the run.
        """
        ...  # pragma: no cover

    def forget(self, tickets: Collection[str]) -> None:
        """Says that the answers of these tickets matter no more; what comes of them is thrown away."""
        ...  # pragma: no cover
