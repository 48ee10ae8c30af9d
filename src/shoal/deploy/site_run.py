"""One run, as a site's own process sees it: who asked for what, and what was answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shoal.deploy.answer import Answer
from shoal.deploy.checks import not_finite
from shoal.deploy.parcel import Parcel
from shoal.deploy.request import Request
from shoal.deploy.run_process import RunProcess
from shoal.deploy.site_settings import Allowed, Limits
from shoal.errors import EngineError

START = 360.0
"""Seconds that the first task of a process may take longer: it imports the experiment and starts the ranks."""

MARGIN = 20.0
"""Seconds beyond a task's own, in which the run's process may say by itself which rank is late, and where it is."""

Task = tuple[Request, Parcel, Future[Parcel]]


class SiteRun:
    """Runs the tasks of one run, one after the other; a task that was asked for before is answered as then.

    Of the tasks that wait for their turn only the newest counts: the server has given up the others.

    Args:
        request: The first of the run.
        allowed: The experiment.
        limits: The site's.
        site: The site's name.
        command: Starts the run's process.
        folder: The site's.
    """

    def __init__(
        self, request: Request, allowed: Allowed, limits: Limits, *, site: str, command: Sequence[str], folder: Path
    ) -> None:
        self.run, self.attempt, self.experiment = request.run, request.attempt, request.experiment
        self.settings = dict(request.settings)
        """The experiment's, as the run began with them: they are what the site has allowed."""
        self.heard = time.monotonic()
        """When the run was last heard of."""
        self._allowed = allowed
        self._limits = limits
        self._site = site
        self._command = list(command)
        self._folder = folder
        self._process: RunProcess | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shoal-run")
        self._last: tuple[tuple[int, int, str], Future[Parcel]] | None = None
        self._next: Task | None = None

    @property
    def working(self) -> bool:
        """Whether a task is being worked at."""
        with self._lock:
            return self._last is not None and not self._last[1].done()

    def other(self, request: Request) -> str | None:
        """Says what of a request of this run is not as the run began; None where all is.

        The experiment and its settings were allowed together, and the run's process has them.
        """
        if request.experiment != self.experiment:
            return f"run {self.run} began with experiment {self.experiment}, and not with {request.experiment}"
        if request.settings != self.settings:
            return f"run {self.run} of {self.experiment} began with other settings"
        return None

    def ask(self, request: Request, parcel: Parcel) -> Future[Parcel]:
        """Returns what will be the answer to a request. It is cancelled if a newer task comes before its turn does.

        Raises:
            EngineError: The run was closed.
        """
        key = (request.attempt, request.number, request.kind)
        with self._lock:
            if self._closed:
                raise EngineError(f"run {self.run} has ended at this site")
            self.heard = time.monotonic()
            self.attempt = max(self.attempt, request.attempt)
            if self._last is None or self._last[0] != key or _failed(self._last[1]):
                if self._next is not None:
                    self._next[2].cancel()
                future: Future[Parcel] = Future()
                self._last, self._next = (key, future), (request, parcel, future)
                self._pool.submit(self._take)
            return self._last[1]

    def end(self, request: Request, parcel: Parcel) -> Future[Parcel] | None:
        """Has the ranks end by themselves; returns None where they are to be ended at once instead.

        That is so where they are at a task, whose reply the server does not want any more, or are not there.

        Raises:
            EngineError: The run was closed.
        """
        with self._lock:
            last = self._last
            at_a_task = last is not None and last[0][2] != "end" and not last[1].done()
            if at_a_task or self._process is None:
                return None
        return self.ask(request, parcel)

    def idle(self, now: float) -> bool:
        """Tells whether nothing was heard of the run for as long as the site allows."""
        return not self.working and now - self.heard > self._limits.idle

    def close(self) -> None:
        """Ends the run's process and its ranks; what is being worked at fails."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
            waiting, self._next = self._next, None
        if waiting is not None:
            waiting[2].cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if process is not None:
            process.stop()

    def _take(self) -> None:
        """Works at the newest task that waits."""
        with self._lock:
            task, self._next = self._next, None
        if task is None or not task[2].set_running_or_notify_cancel():
            return
        request, parcel, future = task
        try:
            future.set_result(self._work(request, parcel))
        except Exception as error:
            future.set_exception(error)

    def _work(self, request: Request, parcel: Parcel) -> Parcel:
        started = time.monotonic()
        process, within = self._ready(request)
        try:
            answered = process.ask(parcel, within=within)
            answer = Answer.from_json(answered.meta)
        except (EngineError, ValueError):
            self._dismiss(process)
            raise
        if answer.error:
            # It ends by itself, too; the next request is to find a new one, and no rank of this one.
            self._dismiss(process)
            return answered
        if problem := self._problem(answered):
            return Parcel(meta=Answer(site=self._site, number=request.number, error=problem, refused=True).to_json())
        self.heard = time.monotonic()
        return Parcel(
            meta={**answered.meta, "seconds": answer.seconds or self.heard - started}, tensors=answered.tensors
        )

    def _ready(self, request: Request) -> tuple[RunProcess, float]:
        """Returns the run's process, and the seconds in which it must answer.

        Raises:
            EngineError: It cannot be started, or has ended since its last task, or the run was closed.
        """
        with self._lock:
            process = self._process
        if process is not None and process.alive:
            return process, self._limits.seconds + MARGIN
        if process is not None:
            self._dismiss(process)
            if request.kind in ("train", "evaluate"):  # what its ranks had is lost: whether that matters, others say
                raise process.ended()
        process = RunProcess(self._command, self._told(), self._folder / "logs" / f"{self.run}.log", {})
        with self._lock:
            closed = self._closed
            self._process = None if closed else process
        if closed:  # meanwhile
            process.stop()
            raise EngineError(f"run {self.run} has ended at this site")
        return process, self._limits.seconds + MARGIN + START

    def _dismiss(self, process: RunProcess) -> None:
        with self._lock:
            if self._process is process:
                self._process = None
        process.stop()

    def _told(self) -> dict[str, Any]:
        """Returns what the run's process is told of the experiment."""
        allowed = self._allowed
        return {
            "source": allowed.source,
            "settings": dict(self.settings),
            "site": self._site,
            "devices": allowed.devices,
            "accelerator": allowed.accelerator,
            "config": dict(allowed.config),
            "same_version": allowed.same_version,
            "seconds": self._limits.seconds,
            "logs": str(self._folder / "logs" / self.run),
        }

    def _problem(self, answered: Parcel) -> str | None:
        """Says why an answer does not leave the site; None if it does."""
        size = answered.nbytes / 1e6
        if size > self._limits.megabytes:
            return f"its update has {size:.0f} MB, and this site sends at most {self._limits.megabytes:g}"
        return not_finite(answered.tensors)


def _failed(future: Future[Parcel]) -> bool:
    """Tells whether a task has ended without an answer that could be given again."""
    if not future.done():
        return False
    if future.cancelled() or future.exception() is not None:
        return True
    told: Mapping[str, Any] = future.result().meta
    return bool(told.get("error"))
