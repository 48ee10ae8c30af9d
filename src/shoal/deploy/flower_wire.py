"""Flower's messages as a wire: from the process of a ServerApp to the SuperNodes, and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from shoal.deploy.flower_records import arrays_of, parcel_of, records_of
from shoal.deploy.parcel import Parcel, RawTensor
from shoal.errors import EngineError, MissingExtraError

try:
    from flwr.app import Message, MessageType
except ModuleNotFoundError as missing:
    raise MissingExtraError("flwr", purpose="send messages with Flower", extra="flower") from missing

ASK = 0.25
"""Seconds between two questions about the same reply."""

TTL = 24 * 3600.0
"""Seconds after which Flower drops a message and its reply."""

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

        Raises:
            EngineError: The SuperLink is gone, has ended the run, or refuses the message.
        """
        if not to:
            return {}
        content = records_of(parcel, self._arrays(parcel.tensors))
        messages = [Message(content, int(node), MessageType.TRAIN, ttl=self._ttl) for node in to]
        tickets = list(_asked("take a message", lambda: self._grid.push_messages(messages)))
        if len(tickets) != len(to):
            raise EngineError(
                f"Flower did not take {len(to)} messages with one of {parcel.nbytes} bytes: they are more than it "
                "allows in one request; the log of the run says why"
            )
        # One that Flower could not file has no number of its own, and nothing will ever come of it.
        named = [ticket or f"lost-{node}-{time.monotonic_ns()}" for ticket, node in zip(tickets, to, strict=True)]
        self._waiting += [ticket for ticket in named if not ticket.startswith("lost-")]
        return dict(zip(to, named, strict=True))

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
                    yield ticket, answer
            left = until - time.monotonic()
            if found or left <= 0:
                return
            time.sleep(min(ASK, left))

    def forget(self, tickets: Collection[str]) -> None:
        """Asks for the replies of these tickets no more; Flower drops them with the run."""
        for ticket in tickets:
            self._drop(ticket)

    def _pulled(self, ticket: str) -> Parcel | Exception | None:
        for message in _asked("hand over a reply", lambda: self._grid.pull_messages([ticket])):
            if message.has_error():
                error = message.error
                return EngineError(f"Flower has no reply of a site ({error.code}): {error.reason}")
            try:
                return parcel_of(message.content)
            except EngineError as damaged:
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


def _bound_retries(grid: Any, patience: float) -> None:
    """Has the grid give up at some time: by itself it would call a SuperLink that is gone for ever."""
    invoker: Any = getattr(grid, "__dict__", {}).get("_retry_invoker")
    if invoker is not None:
        invoker.max_time = patience
