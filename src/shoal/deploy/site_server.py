"""The process ``shoal site``: it takes requests, allows or refuses them, and records what goes in and out."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import IO

from shoal.deploy.answer import Answer
from shoal.deploy.audit import AuditLog, summary
from shoal.deploy.bridge import ADDRESS, site_address
from shoal.deploy.checks import not_finite
from shoal.deploy.parcel import Parcel, read_parcel, write_parcel
from shoal.deploy.request import Request
from shoal.deploy.site_run import START, SiteRun
from shoal.deploy.site_settings import SiteSettings
from shoal.errors import ConfigurationError, EngineError, ShoalError, StorageError
from shoal.processes.memory import give_large_memory_back
from shoal.processes.messages import receive, send
from shoal.processes.table import credentials
from shoal.runs.files import storing, write_json
from shoal.sites.address import Address

logger = logging.getLogger("shoal")

LOOK = 0.5
"""Seconds between two looks at idle runs, and at whether to end."""

INTRODUCTION = 5.0
"""Seconds in which who has connected must have said what it wants."""

CROWD = 64
"""The most requests that wait at once."""


class SiteServer:
    """A site's own process.

    Args:
        folder: The site's: its settings, its record, its logs.
        command: Starts the process of a run.

    Raises:
        ConfigurationError: The settings cannot be used, or another process serves the folder.
    """

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder = folder
        self.settings = SiteSettings.read(folder)
        self._command = command
        self._lock_file = _locked(folder)
        self._audit = AuditLog(folder)
        self._run: SiteRun | None = None
        self._runs = threading.Lock()
        self._serving = threading.BoundedSemaphore(CROWD)
        self._over = threading.Event()
        _remove_old(folder)
        self.address = Address.create()
        self._listener = self.address.listen()
        write_json(folder / ADDRESS, {"socket": str(self.address.folder), "process": os.getpid()})

    def serve(self) -> None:
        """Takes requests until :meth:`stop`."""
        give_large_memory_back()
        self._listener.settimeout(LOOK)
        while not self._over.is_set():
            self._end_idle()
            try:
                stream, _ = self._listener.accept()
            except TimeoutError:
                continue
            if not self._serving.acquire(blocking=False):
                stream.close()
                continue
            threading.Thread(target=self._attend, args=(stream,), name="shoal-request", daemon=True).start()

    def stop(self) -> None:
        """Has :meth:`serve` return."""
        self._over.set()

    def close(self) -> None:
        """Ends the run's processes, and takes the address back."""
        self._over.set()
        with self._runs:
            run, self._run = self._run, None
        if run is not None:
            run.close()
        self._listener.close()
        (self.folder / ADDRESS).unlink(missing_ok=True)
        self.address.remove()
        self._lock_file.close()

    def _attend(self, stream: socket.socket) -> None:
        """Serves one connection: a request and its answer."""
        try:
            with stream:
                parcel = self._received(stream)
                answer = None if parcel is None else self._answered(parcel)
                # A site that is on its way out has not failed: it is asked again when it is back.
                if answer is not None and not self._over.is_set():
                    self._reply(stream, answer)
        except (OSError, ValueError) as error:
            logger.warning("a request could not be served: %s", error)
        finally:
            self._serving.release()

    def _answered(self, parcel: Parcel) -> Parcel:
        """Returns the answer to a request, whatever it is, and whatever goes wrong."""
        try:
            return self._allowed(parcel)
        except StorageError as error:  # what cannot be recorded does not leave
            logger.warning("%s", error)
            said = str(error)
        except Exception as error:
            logger.exception("a request could not be served")
            said = f"the site failed: {type(error).__name__}: {error}"
        return Parcel(meta=Answer(site=self.settings.name, error=said).to_json())

    def _received(self, stream: socket.socket) -> Parcel | None:
        """Returns the request of somebody who knows the key."""
        stream.settimeout(INTRODUCTION)
        received = receive(stream)
        if received is None:
            return None
        message, fd = received
        said = str(message.get("key", "")).encode(errors="replace")
        known = secrets.compare_digest(said, self.address.key.encode()) and credentials(stream)[1] == os.getuid()
        if fd is None or not known:
            if fd is not None:
                os.close(fd)
            return None
        return read_parcel(fd)

    @staticmethod
    def _reply(stream: socket.socket, answer: Parcel) -> None:
        fd = write_parcel(answer)
        try:
            stream.settimeout(INTRODUCTION)
            send(stream, {"answer": True}, fd)
        finally:
            os.close(fd)

    def _allowed(self, parcel: Parcel) -> Parcel:
        """Returns the answer to a request, or the refusal; and records it.

        Raises:
            StorageError: It cannot be recorded.
        """
        try:
            request = Request.from_json(parcel.meta)
        except ValueError as error:
            return self._refused(None, f"the request makes no sense: {error}")
        logger.info("%s of run %s, round %d", request.kind, request.run, request.round)
        if problem := self._refusal(request, parcel):
            return self._refused(request, problem)
        if request.kind == "hello" and not request.clients:
            return Parcel(meta=Answer(site=self.settings.name).to_json())
        received = _in_background(lambda: summary(parcel.tensors))
        try:
            answer = self._worked(request, parcel)
        except CancelledError:
            answer = Parcel(
                meta=Answer(
                    site=self.settings.name, number=request.number, error="a newer task came before this one's turn did"
                ).to_json()
            )
        except ConfigurationError as error:
            return self._refused(request, str(error))
        except (ShoalError, ValueError) as error:
            answer = Parcel(meta=Answer(site=self.settings.name, number=request.number, error=str(error)).to_json())
        if request.kind in ("train", "evaluate"):
            self._record(request, received, answer)
        return answer

    def _worked(self, request: Request, parcel: Parcel) -> Parcel:
        """Has the request's run do it.

        Raises:
            ConfigurationError: The run began with another experiment, or with other settings.
            EngineError: The run's process has ended, or takes too long.
            CancelledError: A newer task came before this one's turn did.
        """
        with self._runs:
            run = self._run
            if run is not None and run.run != request.run and not run.idle(time.monotonic()):
                busy = Answer(
                    site=self.settings.name, number=request.number, busy=True,
                    error=f"this site works for run {run.run} of {run.experiment}",
                )  # fmt: skip
                return Parcel(meta=busy.to_json())
            if run is not None and request.attempt < run.attempt and run.run == request.run:
                raise EngineError(f"run {run.run} was started again since, as attempt {run.attempt}")
            if run is not None and (run.run != request.run or self._begins_anew(run, request)):
                run.close()
                run = self._run = None
            if run is None and request.kind != "end":
                run = self._run = self._begun(request)
            # Asked here, so that nobody ends the run as idle between.
            asked = None if run is None else self._asked(run, request, parcel)
        done = Parcel(meta=Answer(site=self.settings.name, number=request.number).to_json())
        try:
            return done if asked is None else self._waited(asked)
        finally:
            if run is not None and request.kind == "end":
                self._end(run)

    @staticmethod
    def _begins_anew(run: SiteRun, request: Request) -> bool:
        """Tells whether the request begins its run, which is known, once more.

        A server that was started again may have other settings, such as more rounds. They were checked as those of a
        first request are.

        Raises:
            ConfigurationError: It is of another experiment, or has other settings without a new start of the server.
        """
        problem = run.other(request)
        if problem is None:
            return False
        if request.experiment == run.experiment and request.attempt > run.attempt:
            return True
        raise ConfigurationError(problem)

    @staticmethod
    def _asked(run: SiteRun, request: Request, parcel: Parcel) -> Future[Parcel] | None:
        """Returns what will be the answer; None where the run is to be ended at once."""
        return run.end(request, parcel) if request.kind == "end" else run.ask(request, parcel)

    def _waited(self, asked: Future[Parcel]) -> Parcel:
        within = self.settings.limits.seconds + 2 * START
        try:
            return asked.result(within)
        except FutureTimeoutError as error:
            raise EngineError(f"the task was not done within {within:g} s") from error

    def _end(self, run: SiteRun) -> None:
        with self._runs:
            if self._run is run:
                self._run = None
            run.close()  # before another run begins

    def _begun(self, request: Request) -> SiteRun:
        return SiteRun(
            request,
            self.settings.allowed[request.experiment],
            self.settings.limits,
            site=self.settings.name,
            command=self._command,
            folder=self.folder,
        )

    def _refusal(self, request: Request, parcel: Parcel) -> str | None:
        """Says why the site will not do what is asked; None if it will."""
        allowed = self.settings.allowed.get(request.experiment)
        if allowed is None:
            names = ", ".join(sorted(self.settings.allowed))
            return f"it does not allow an experiment {request.experiment}; allowed are {names}"
        return allowed.refusal(request.settings) or self._beyond(request, parcel)

    def _beyond(self, request: Request, parcel: Parcel) -> str | None:
        """Says which limit of the site a request is beyond; None where it is within all."""
        limits = self.settings.limits
        if self.settings.name not in request.clients and (request.clients or request.kind != "hello"):
            names = ", ".join(sorted(request.clients)[:8]) or "none"
            return f"the federation has no site {self.settings.name}; it has {names}"
        if max(request.round, request.rounds) > limits.rounds:
            return f"{max(request.round, request.rounds)} rounds were asked for, and it does at most {limits.rounds}"
        if parcel.nbytes > limits.megabytes * 1e6:
            return f"a model of {parcel.nbytes / 1e6:.0f} MB was sent, and it takes at most {limits.megabytes:g}"
        if problem := not_finite(parcel.tensors):
            return f"of the model that was sent {problem}"
        return None

    def _refused(self, request: Request | None, problem: str) -> Parcel:
        told = {"kind": request.kind, "run": request.run} if request else {}
        self._audit.write({**told, "refused": problem})
        number = request.number if request else 0
        return Parcel(meta=Answer(site=self.settings.name, number=number, error=problem, refused=True).to_json())

    def _record(self, request: Request, received: Future[dict[str, object]], answer: Parcel) -> None:
        answered = Answer.from_json(answer.meta)
        self._audit.write(
            {
                "kind": request.kind,
                "run": request.run,
                "experiment": request.experiment,
                "round": request.round,
                "number": request.number,
                "received": received.result(60.0),
                "sent": summary(answer.tensors) | {"examples": answered.examples, "metrics": dict(answered.metrics)},
                **({"error": answered.error} if answered.error else {}),
            }
        )

    def _end_idle(self) -> None:
        with self._runs:
            run = self._run
            if run is None or not run.idle(time.monotonic()):
                return
            self._run = None
            logger.info("nothing was heard of run %s for long: its processes are ended", run.run)
            run.close()  # before another run begins


def _in_background(work: Callable[[], dict[str, object]]) -> Future[dict[str, object]]:
    future: Future[dict[str, object]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="shoal-audit", daemon=True).start()
    return future


def _remove_old(folder: Path) -> None:
    """Removes the address of a process that was killed."""
    with contextlib.suppress(ConfigurationError):
        site_address(folder).remove()


def _locked(folder: Path) -> IO[bytes]:
    """Returns the file whose lock says that this process serves the folder."""
    with storing(folder / "lock"):
        file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigurationError(f"another shoal site runs in {folder}: stop it, or use another folder") from error
    return file
