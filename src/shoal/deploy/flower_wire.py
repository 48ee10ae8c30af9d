"""Flower's messages as a wire: from the process of a ServerApp to the SuperNodes, and back."""

from __future__ import annotations

import datetime
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from shoal.deploy.flower_records import arrays_of, parcel_of, records_of
from shoal.deploy.parcel import Parcel, RawTensor
from shoal.errors import EngineError, MissingExtraError

try:
    from flwr.app import Message, MessageType
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
except ModuleNotFoundError as missing:
    raise MissingExtraError("flwr", purpose="send messages with Flower", extra="flower") from missing

ASK = 0.25
"""Seconds between two questions about the same reply."""

TTL = 24 * 3600.0
"""Seconds after which Flower drops a message and its reply."""

DAMAGED = (AttributeError, DecodeError, LookupError, OverflowError, RecursionError, TypeError, ValueError)
"""What Flower raises where it cannot put together the objects that a site has sent; what httpx raises is none."""

PATIENCE = 60.0
"""Seconds in which a SuperLink that does not answer must be back."""


class FlowerWire:
    """Sends parcels through a SuperLink; an address is the number of a SuperNode.

    Args:
        grid: What Flower gave the ServerApp.
        ttl: Seconds after which Flower drops a message and its reply: longer than any task may take.
        patience: Seconds in which a SuperLink that does not answer must be back.
    """

    def __init__(self, grid: Any, *, ttl: float = TTL, patience: float = PATIENCE) -> None:
        self.name = "flower"
        self._grid = grid
        self._ttl = ttl
        self._waiting: list[str] = []
        self._sent: dict[str, tuple[str, weakref.ref[Parcel], float]] = {}  # node, parcel and time by ticket
        self._uploaded: tuple[Mapping[str, RawTensor], Any] | None = None
        _bound_retries(grid, patience)

    def present(self) -> Collection[str]:
        """Returns the SuperNodes that are online; each call asks the SuperLink.

        Raises:
            EngineError: The SuperLink is gone, or has ended the run.
        """
        return [str(node) for node in _asked("say which SuperNodes are online", self._grid.get_node_ids)]

    def send(self, to: Sequence[str], parcel: Parcel) -> Mapping[str, str]:
        """Sends a parcel to several SuperNodes; its tensors reach the SuperLink once.

        The SuperLink keeps messages until they are fetched. So a parcel that a SuperNode has been sent before, and has
        not answered, is not sent again unless that SuperNode was started anew since: it has the same ticket again.

        Raises:
            EngineError: The SuperLink is gone, has ended the run, or refuses the message.
        """
        tickets = self._under_way(to, parcel)
        self._waiting += [ticket for ticket in tickets.values() if ticket not in self._waiting]
        if new := [node for node in to if node not in tickets]:
            tickets |= self._push(new, parcel)
        return tickets

    def receive(self, seconds: float) -> Iterator[tuple[str, Parcel | Exception]]:
        """Yields the replies that have come; each is asked for by itself, so that one is in memory at a time.

        Raises:
            EngineError: The SuperLink is gone, or has ended the run.
        """
        until = time.monotonic() + seconds
        found = False
        while True:
            for ticket in list(self._waiting):
                if ticket not in self._waiting:
                    continue  # it was forgotten meanwhile
                answer = self._pulled(ticket)
                if answer is not None:
                    found = True
                    self._drop(ticket)
                    self._sent.pop(ticket, None)
                    yield ticket, answer
            left = until - time.monotonic()
            if found or left <= 0:
                return
            time.sleep(min(ASK, left))

    def forget(self, tickets: Collection[str]) -> None:
        """Asks for the replies of these tickets no more, unless the same parcel is sent again."""
        for ticket in tickets:
            self._drop(ticket)

    def _push(self, to: Sequence[str], parcel: Parcel) -> dict[str, str]:
        content = records_of(parcel, self._arrays(parcel.tensors))
        messages = [Message(content, int(node), MessageType.TRAIN, ttl=self._ttl) for node in to]
        pushed = list(_asked("take a message", lambda: self._grid.push_messages(messages)))
        if len(pushed) != len(to):
            raise EngineError(
                f"Flower did not take {len(to)} messages with one of {parcel.nbytes} bytes: they are more than it "
                "allows in one request; the log of the run says why"
            )
        now = time.time()
        tickets = {}
        for node, ticket in zip(to, pushed, strict=True):
            # One that Flower could not file has no number of its own, and nothing will ever come of it.
            tickets[node] = ticket or f"lost-{node}-{time.monotonic_ns()}"
            for old in [old for old, (whose, _, _) in self._sent.items() if whose == node and old not in self._waiting]:
                del self._sent[old]
            if ticket:
                self._waiting.append(ticket)
                self._sent[ticket] = (node, weakref.ref(parcel), now)
        return tickets

    def _under_way(self, to: Sequence[str], parcel: Parcel) -> dict[str, str]:
        """Returns the tickets of those who have this parcel already and will answer it."""
        found = {
            node: (ticket, at) for ticket, (node, sent, at) in self._sent.items() if node in to and sent() is parcel
        }
        if not found:
            return {}
        nodes = _asked("say which SuperNodes are online", lambda: list(self._grid.get_nodes()))
        began = {str(node.node_id): _seconds(node.last_activated_at) for node in nodes}
        return {node: ticket for node, (ticket, at) in found.items() if began.get(node, at + 1) < at}

    def _pulled(self, ticket: str) -> Parcel | Exception | None:
        def pulled() -> list[Any] | ValueError:
            try:
                return list(self._grid.pull_messages([ticket]))
            except DAMAGED as error:  # which is the failure of that site alone, and not of the SuperLink
                return ValueError(f"Flower cannot read a reply of a site: {type(error).__name__}: {error}")

        messages = _asked("hand over a reply", pulled)
        if isinstance(messages, ValueError):
            return messages
        for message in messages:
            if message.has_error():
                error = message.error
                return EngineError(f"Flower has no reply of a site ({error.code}): {error.reason}")
            try:
                return parcel_of(message.content)
            except ValueError as damaged:
                return damaged
        return None

    def _drop(self, ticket: str) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        if not self._waiting:
            self._uploaded = None  # a model is not kept between rounds for the sake of sending it again

    def _arrays(self, tensors: Mapping[str, RawTensor]) -> Any:
        """Returns tensors as a record, the same one while they are the same: Flower uploads it once."""
        if self._uploaded is not None:
            known, record = self._uploaded
            if known.keys() == tensors.keys() and all(known[name] is tensor for name, tensor in tensors.items()):
                return record
        record = arrays_of(tensors)
        self._uploaded = (dict(tensors), record)
        return record


def _asked(what: str, call: Callable[[], Any]) -> Any:
    """Returns what the SuperLink answers.

    Raises:
        EngineError: It does not, or has ended the run.
    """
    try:
        return call()
    except BaseException as error:  # httpx's, flwr's own, and whatever its next version raises
        status = getattr(getattr(error, "response", None), "status_code", None)
        # Flower's is no Exception, so that nobody catches it by chance, and shoal would not either.
        if status in {401, 403} or type(error).__name__ == "RunNotRunningException":
            ended = "Flower has ended the run: somebody stopped it, or its SuperLink was started anew"
            raise EngineError(ended) from error
        if not isinstance(error, Exception):
            raise
        raise EngineError(f"Flower's SuperLink did not {what}: {type(error).__name__}: {error}") from error


def _seconds(stamp: str) -> float:
    """Returns a time that Flower tells, in seconds since 1970; an endless one where it tells none."""
    try:
        return datetime.datetime.fromisoformat(stamp).timestamp()
    except (TypeError, ValueError):
        return float("inf")


def _bound_retries(grid: Any, patience: float) -> None:
    """Has the grid give up at some time: by itself it would call a SuperLink that is gone for ever."""
    invoker: Any = getattr(grid, "__dict__", {}).get("_retry_invoker")
    if invoker is not None:
        invoker.max_time = patience
