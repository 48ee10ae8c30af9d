"""The wire over NVFlare: each parcel is a task for one client, which the client fetches and answers."""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from shoal.deploy.nvflare_messages import REASON, TASK, WITHIN, packed, unpacked
from shoal.deploy.parcel import Parcel
from shoal.errors import EngineError

DAY = 86400.0

GLANCE = 0.2
"""Seconds between two looks at whether the job was aborted."""

REASONS = {
    TaskCompletionStatus.TIMEOUT: "gave no answer in time",
    TaskCompletionStatus.CLIENT_DEAD: "is gone",
    TaskCompletionStatus.ABORTED: "was told to stop: the job was aborted",
    TaskCompletionStatus.ERROR: "could not be sent its task",
}
"""Why NVFlare gives up a task, as it reads after the client's name."""


@dataclass(eq=False)
class _Sent:
    """A parcel on its way to a client, and its answer's on its way back."""

    client: str
    parcel: Parcel
    ticket: str
    task: Task | None = None
    """None where there is no such client."""


class NvflareWire:
    """A job of NVFlare as a wire; its addresses are the names of the job's clients.

    NVFlare has read an answer into memory before it tells of it; whoever takes the answer from :meth:`receive` holds
    the only reference to it.

    Args:
        controller: Sends the tasks.
        fl_ctx: Of the call of its ``control_flow``, which is where the wire is used.
        abort_signal: Of the same call.
        within: Seconds in which a client must answer. The client's side learns of it and gives up then, too, so that
            it can take other tasks.
    """

    name = "nvflare"

    def __init__(self, controller: Controller, fl_ctx: FLContext, abort_signal: Signal, *, within: float = DAY) -> None:
        self._controller = controller
        self._fl_ctx = fl_ctx
        self._abort = abort_signal
        self._within = max(int(within), 1)
        self._answers: queue.SimpleQueue[tuple[_Sent, Shareable | Exception]] = queue.SimpleQueue()
        self._open: dict[str, _Sent] = {}
        self._parted: dict[str, _Sent] = {}
        """What was forgotten since the last look, by client."""

    def present(self) -> Collection[str]:
        """Returns the names of the job's clients but for those that NVFlare takes for disconnected.

        Raises:
            EngineError: The job was aborted.
        """
        self._check()
        names = [client.name for client in self._fl_ctx.get_engine().get_clients()]
        return [name for name in names if not self._controller.get_client_disconnect_time(name)]

    def send(self, to: Sequence[str], parcel: Parcel) -> Mapping[str, str]:
        """Has a task wait for each of the clients, which fetch it when they next ask; they all share the tensors.

        A client works at one task at a time, and NVFlare loses none. So where the same parcel was forgotten just
        before, its task is left to the client under a new ticket, and neither task nor answer travels twice.

        Raises:
            EngineError: The job was aborted.
        """
        self._check()
        message: Shareable | None = None
        known = {client.name for client in self._fl_ctx.get_engine().get_clients()}
        tickets = {}
        for name in to:
            sent = self._parted.get(name)
            if sent is not None and sent.parcel is parcel and sent.task is not None:
                del self._parted[name]
                sent.ticket = uuid.uuid4().hex
            else:
                sent = _Sent(name, parcel, uuid.uuid4().hex)
            tickets[name] = sent.ticket
            self._open[sent.ticket] = sent
            if name not in known:
                self._answers.put((sent, EngineError(f"{name} is not a client of this job of NVFlare")))
            elif sent.task is None:
                message = message or self._message(parcel)
                sent.task = self._task(sent, message)
                self._controller.send(sent.task, self._fl_ctx, targets=[name])
        return tickets

    def receive(self, seconds: float) -> Iterator[tuple[str, Parcel | Exception]]:
        """Yields the tickets whose answers have come, each with its answer or with what went wrong.

        Raises:
            EngineError: The job was aborted.
        """
        self._take_back()
        arrived = self._first(seconds)
        while arrived:
            if arrived[0][0].ticket in self._open:
                yield self._taken(arrived)  # what is yielded must not have a name here, or it would be kept meanwhile
            else:
                arrived.clear()  # nobody wants it any more
            with contextlib.suppress(queue.Empty):
                arrived.append(self._answers.get_nowait())

    def forget(self, tickets: Collection[str]) -> None:
        """Has answers thrown away; tasks that were not fetched are taken back unless they are sent again at once."""
        for ticket in tickets:
            if (sent := self._open.pop(ticket, None)) is not None and sent.task is not None:
                self._take_back(sent.client)
                self._parted[sent.client] = sent

    def _take_back(self, client: str | None = None) -> None:
        """Takes back what was forgotten: of one client, or of all."""
        for name in list(self._parted) if client is None else [client]:
            if (sent := self._parted.pop(name, None)) is not None:
                self._controller.cancel_task(sent.task)

    def _message(self, parcel: Parcel) -> Shareable:
        message = packed(parcel)
        message.set_header(WITHIN, self._within)
        return message

    def _task(self, sent: _Sent, message: Shareable) -> Task:
        def answered(client_task: ClientTask, **_: Any) -> None:
            self._answers.put((sent, client_task.result))
            client_task.result = None  # NVFlare keeps the task a while

        def done(task: Task, **_: Any) -> None:
            if task.completion_status in REASONS:
                self._answers.put((sent, EngineError(f"{sent.client} {REASONS[task.completion_status]}")))

        return Task(TASK, message, timeout=self._within, result_received_cb=answered, task_done_cb=done)

    def _first(self, seconds: float) -> list[tuple[_Sent, Shareable | Exception]]:
        """Waits for an answer; returns it in a list, which is empty where none came."""
        until = time.monotonic() + seconds
        while True:
            self._check()
            left = max(until - time.monotonic(), 0.0)
            with contextlib.suppress(queue.Empty):
                return [self._answers.get(timeout=min(left, GLANCE))]
            if not left:
                return []

    def _taken(self, arrived: list[tuple[_Sent, Shareable | Exception]]) -> tuple[str, Parcel | Exception]:
        """Takes an answer from a list, closes its ticket, and reads it."""
        sent, found = arrived.pop()
        del self._open[sent.ticket]
        return sent.ticket, self._read(found)

    @staticmethod
    def _read(found: Shareable | Exception) -> Parcel | Exception:
        if isinstance(found, Exception):
            return found
        code = found.get_return_code()
        if code != ReturnCode.OK:
            return EngineError(str(found.get_header(REASON) or f"the client answered {code}"))
        try:
            return unpacked(found)
        except ValueError as error:
            return error

    def _check(self) -> None:
        if self._abort.triggered:
            with contextlib.suppress(Exception):
                self._controller.cancel_all_tasks()
            raise EngineError("the job of NVFlare was aborted")
