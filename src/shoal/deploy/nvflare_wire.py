"""The wire over NVFlare: each parcel is a task for one client, which the client fetches and answers."""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
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
        self._answers: queue.SimpleQueue[tuple[str, Shareable | Exception]] = queue.SimpleQueue()
        self._open: dict[str, Task | None] = {}

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

        Raises:
            EngineError: The job was aborted.
        """
        self._check()
        message = packed(parcel)
        message.set_header(WITHIN, self._within)
        known = {client.name for client in self._fl_ctx.get_engine().get_clients()}
        tickets = {}
        for name in to:
            ticket = tickets[name] = uuid.uuid4().hex
            if name not in known:
                self._open[ticket] = None
                self._answers.put((ticket, EngineError(f"{name} is not a client of this job of NVFlare")))
                continue
            task = self._task(ticket, name, message)
            self._open[ticket] = task
            self._controller.send(task, self._fl_ctx, targets=[name])
        return tickets

    def receive(self, seconds: float) -> Iterator[tuple[str, Parcel | Exception]]:
        """Yields the tickets whose answers have come, each with its answer or with what went wrong.

        Raises:
            EngineError: The job was aborted.
        """
        arrived = self._first(seconds)
        while arrived:
            if arrived[0][0] in self._open:
                yield self._taken(arrived)  # what is yielded must not have a name here, or it would be kept meanwhile
            else:
                arrived.clear()  # nobody wants it any more
            with contextlib.suppress(queue.Empty):
                arrived.append(self._answers.get_nowait())

    def forget(self, tickets: Collection[str]) -> None:
        """Takes tasks back: those that were not fetched are not sent, and answers to the others are thrown away."""
        for ticket in tickets:
            if (task := self._open.pop(ticket, None)) is not None:
                self._controller.cancel_task(task)

    def _task(self, ticket: str, name: str, message: Shareable) -> Task:
        def answered(client_task: ClientTask, **_: Any) -> None:
            self._answers.put((ticket, client_task.result))
            client_task.result = None  # NVFlare keeps the task a while

        def done(task: Task, **_: Any) -> None:
            if task.completion_status in REASONS:
                self._answers.put((ticket, EngineError(f"{name} {REASONS[task.completion_status]}")))

        return Task(TASK, message, timeout=self._within, result_received_cb=answered, task_done_cb=done)

    def _first(self, seconds: float) -> list[tuple[str, Shareable | Exception]]:
        """Waits for an answer; returns it in a list, which is empty where none came."""
        until = time.monotonic() + seconds
        while True:
            self._check()
            left = max(until - time.monotonic(), 0.0)
            with contextlib.suppress(queue.Empty):
                return [self._answers.get(timeout=min(left, GLANCE))]
            if not left:
                return []

    def _taken(self, arrived: list[tuple[str, Shareable | Exception]]) -> tuple[str, Parcel | Exception]:
        """Takes an answer from a list, closes its ticket, and reads it."""
        ticket, found = arrived.pop()
        del self._open[ticket]
        return ticket, self._read(found)

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
