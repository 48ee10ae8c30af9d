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


class SiteRun:
    """Runs the tasks of one run, one after the other; a task that was asked for before is answered as then.

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
        self.heard = time.monotonic()
        """When the run was last heard of."""
        self._allowed = allowed
        self._limits = limits
        self._site = site
        self._command = list(command)
        self._folder = folder
        self._process: RunProcess | None = None
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shoal-run")
        self._last: tuple[tuple[int, int, str], Future[Parcel]] | None = None

    @property
    def working(self) -> bool:
        """Whether a task is being worked at."""
        with self._lock:
            return self._last is not None and not self._last[1].done()

    def ask(self, request: Request, parcel: Parcel) -> Future[Parcel]:
        """Returns what will be the answer to a request."""
        key = (request.attempt, request.number, request.kind)
        with self._lock:
            self.heard = time.monotonic()
            self.attempt = max(self.attempt, request.attempt)
            if self._last is None or self._last[0] != key or _failed(self._last[1]):
                self._last = (key, self._pool.submit(self._work, request, parcel))
            return self._last[1]

    def idle(self, now: float) -> bool:
        """Tells whether nothing was heard of the run for as long as the site allows."""
        return not self.working and now - self.heard > self._limits.idle

    def close(self) -> None:
        """Ends the run's process and its ranks."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def _work(self, request: Request, parcel: Parcel) -> Parcel:
        started = time.monotonic()
        within = self._limits.seconds
        if self._process is not None and not self._process.alive:
            self._process.stop()
            self._process = None
        if self._process is None:
            self._process = RunProcess(
                self._command, self._told(request), self._folder / "logs" / f"{self.run}.log", {}
            )
            within += START
        try:
            answered = self._process.ask(parcel, within=within)
        except EngineError:
            process, self._process = self._process, None
            if process is not None:
                process.stop()
            raise
        answer = Answer.from_json(answered.meta)
        if answer.error:
            return answered
        if problem := self._problem(answered):
            return Parcel(meta=Answer(site=self._site, number=request.number, error=problem, refused=True).to_json())
        self.heard = time.monotonic()
        return Parcel(
            meta={**answered.meta, "seconds": answer.seconds or self.heard - started}, tensors=answered.tensors
        )

    def _told(self, request: Request) -> dict[str, Any]:
        """Returns what the run's process is told of the experiment."""
        allowed = self._allowed
        return {
            "source": allowed.source,
            "settings": dict(request.settings),
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
