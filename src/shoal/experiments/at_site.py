"""The process at a site that works for one run: ``python -m shoal.experiments.at_site SOCKET``.

The site's own process starts it, and tells it on standard input which experiment it is, by the site's own name for it.
It has the code and the ranks of that experiment, and ends with them when the socket is closed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from shoal import trees
from shoal.data import Population
from shoal.deploy.answer import Answer
from shoal.deploy.checks import Spec, misfit
from shoal.deploy.parcel import Parcel, RawTensor, array_of, read_parcel, tensors_in, write_parcel
from shoal.deploy.request import Request
from shoal.engines import SitesEngine
from shoal.errors import ConfigurationError, ShoalError, SiteError
from shoal.experiments.loading import build, load, with_site
from shoal.federation import Experiment
from shoal.federation.cohorts import ClientShards
from shoal.federation.job import start_learner
from shoal.learners.base import Learner
from shoal.processes.messages import receive, send
from shoal.sites import Site
from shoal.sites.allotment import Allotment
from shoal.sites.policy import SitePolicy
from shoal.sites.process import Starter
from shoal.sites.runner import SiteRunner
from shoal.sites.state import Reply
from shoal.sites.task import SiteTask
from shoal.types import Broadcast, LocalObjective, ModelState

LOOK = 0.2
"""Seconds between two looks after the ranks while there is no task."""

PATIENCE = 12.0
"""Seconds in which it ends its ranks, where the site's own process is gone."""


def digest(learner: Learner) -> str:
    """Returns what tells whether two learners compute the same."""
    return hashlib.sha256(json.dumps(learner.describe(), sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the site's own process says of the experiment; see :class:`shoal.deploy.site_settings.Allowed`."""

    source: str
    settings: Mapping[str, str]
    site: str
    devices: Any
    accelerator: Any
    config: Mapping[str, Any]
    same_version: bool
    seconds: float
    """For one task."""
    logs: str
    """Where the logs of the ranks go."""


class SiteWork:
    """The experiment at this site, from its first request on.

    Args:
        told: Which experiment it is.
        request: The first one.

    Raises:
        ConfigurationError: The experiment cannot run here.
    """

    def __init__(self, told: Told, request: Request) -> None:
        self._told = told
        self._client = request.clients[told.site]
        experiment = build(with_site(load(told.source), told.site), dict(told.settings))
        self._learner = experiment.learner
        self._check_version(request)
        site, starter, allotment, policy = _part(experiment, told, self._client)
        # The server decides about rounds; here it is only whether ranks start again.
        lenient = policy.on_failure == "restart"
        here = SitePolicy(
            on_failure="restart" if lenient else "stop",
            max_restarts=policy.max_restarts,
            waits=dataclasses.replace(policy.waits, reply=min(policy.waits.reply, told.seconds)),
        )
        self._learner.preload()
        self.runner = SiteRunner([site], starter, allotment, here)
        self.runner.rounds = request.rounds
        self.runner.open()
        self.runner.keep_logs(Path(told.logs))
        self._specs: dict[str, Spec] | None = None

    def answer(self, request: Request, parcel: Parcel) -> Parcel:
        """Does what a request asks for.

        Raises:
            SiteError: The ranks failed, and are not to be started again.
        """
        if request.kind == "hello":
            self.runner.wait_until_ready()
            return self._said(request, evaluates=bool(self.runner.evaluators()))
        if request.kind == "end":
            self.runner.finish()
            return self._said(request)
        if misfits := self._misfit(request, parcel):
            return self._said(request, error=f"of the model that was sent {misfits}", refused=True)
        work = _Task(request, _broadcast(request, parcel), self._client)
        for _, reply, problem in self.runner.gather(work, [0]):
            if reply is None:
                return self._said(request, error=str(problem))
            try:
                return self._given(request, reply)
            finally:
                reply.close()
        raise SiteError("the ranks were given no task")

    def _given(self, request: Request, reply: Reply) -> Parcel:
        tensors: dict[str, RawTensor] = {}
        if reply.file is not None:
            tensors = tensors_in(reply.file)
        return self._said(
            request,
            tensors,
            evaluates=bool(self.runner.evaluators()),
            examples=reply.examples,
            metrics=dict(reply.metrics),
            tree=reply.tree,
            seconds=reply.seconds,
        )

    def _said(self, request: Request, tensors: Mapping[str, RawTensor] | None = None, **more: Any) -> Parcel:
        return Parcel(meta=Answer(site=self._told.site, number=request.number, **more).to_json(), tensors=tensors or {})

    def _check_version(self, request: Request) -> None:
        """Refuses a server whose learner or script is another.

        Raises:
            ConfigurationError: It is.
        """
        if self._told.same_version and request.digest and request.digest != digest(self._learner):
            raise ConfigurationError(
                f"{request.experiment} here is not what the server has: another learner, script or setting; bring both "
                "to the same version, or say same_version = false in this site's site.toml"
            )

    def _misfit(self, request: Request, parcel: Parcel) -> str | None:
        """Says how the arrays that were sent differ from the experiment's model; None where they do not."""
        if self._specs is None:  # the ranks start meanwhile
            self._specs = _specs(self._learner.init(0))
        spec = dict(self._specs["model"])
        if request.corrected:
            spec |= self._specs["correction"]
        return misfit(parcel.tensors, spec)


class _Task(SiteTask):
    """A task of the server's, for the one site that is here."""

    def __init__(self, request: Request, broadcast: Broadcast, client: int) -> None:
        super().__init__(request.kind, broadcast, ties=request.ties, seed=request.seed)
        self._client = client

    def message(self, client: int) -> dict[str, Any]:
        """Returns what the site is told, with its number in the federation."""
        return super().message(client) | {"client": self._client}


def _part(experiment: Experiment, told: Told, client: int) -> tuple[Site, Starter, Allotment, SitePolicy]:
    """Returns the site that is here, what starts it, its devices, and what is done when it fails."""
    changes: dict[str, Any] = {} if told.devices is None else {"devices": told.devices}
    accelerator = {} if told.accelerator == "auto" else {"accelerator": told.accelerator}
    engine = experiment.engine
    if isinstance(engine, SitesEngine):
        own = next((site for site in engine.sites if site.name == told.site), None)
        if own is None:
            names = ", ".join(site.name for site in engine.sites)
            raise ConfigurationError(f"{experiment.name} has no site {told.site}; its sites are {names}")
        site = dataclasses.replace(own, config={**own.config, **told.config}, **changes)
        return site, engine.starter, dataclasses.replace(engine.allotment, **accelerator), engine.policy
    clients = experiment.clients
    population = clients if isinstance(clients, Population) else Population.from_datasets(clients)
    if client >= len(population):
        raise ConfigurationError(f"{experiment.name} has {len(population)} clients here, and no client {client}")
    shards = ClientShards(population, validation=experiment.client_validation, seed=experiment.seed)
    data = {"data": shards.training(client), "evaluate": shards.validation(client)}
    site = Site(told.site, **{"devices": experiment.learner.devices, **changes, **data})
    return site, start_learner(experiment.learner), Allotment(**accelerator), SitePolicy()


def _broadcast(request: Request, parcel: Parcel) -> Broadcast:
    roles: dict[str, dict[str, Any]] = {"params": {}, "buffers": {}, "constants": {}, "correction": {}}
    for key, tensor in parcel.tensors.items():
        role, _, name = key.partition("/")
        roles[role][name] = array_of(tensor, framework=request.framework)
    correction = roles.pop("correction") if request.corrected else None
    roles.pop("correction", None)
    objective = LocalObjective(proximal=request.proximal, correction=correction)
    return Broadcast(round=request.round, model=ModelState(**roles), objective=objective)


def _specs(model: ModelState) -> dict[str, Spec]:
    """Returns what arrays of a model must be, and those of a correction."""
    parts = {"params": model.params, "buffers": model.buffers, "constants": model.constants}
    found = {name: _of(array) for name, array in trees.flatten(parts).items()}
    corrections = trees.flatten({"correction": model.params})
    return {"model": found, "correction": {name: _of(array) for name, array in corrections.items()}}


def _of(array: Any) -> tuple[str, tuple[int, ...]]:
    return str(array.dtype).removeprefix("torch."), tuple(int(length) for length in array.shape)


def serve(channel: socket.socket, told: Told) -> None:
    """Answers requests until the site's own process closes the socket."""
    work: SiteWork | None = None
    try:
        channel.settimeout(LOOK)
        while True:
            try:
                received = receive(channel)
            except TimeoutError:
                if work is not None:
                    work.runner.tend()
                continue
            if received is None:
                return
            if received[1] is None:
                raise ValueError("a request without its parcel")
            parcel = read_parcel(received[1])
            request = Request.from_json(parcel.meta)
            failed = None
            try:
                work = work or SiteWork(told, request)
                answer = work.answer(request, parcel)
            except (ShoalError, ValueError, TypeError) as error:
                traceback.print_exc()
                failed = error
                refused = isinstance(error, ConfigurationError)
                said = str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: see the site's log"
                answer = Parcel(
                    meta=Answer(site=told.site, number=request.number, error=said, refused=refused).to_json()
                )
            _send(channel, answer)
            if failed is not None:
                return  # the next request finds a new process
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is on its way out
        if work is not None:
            work.runner.close()


def _watch(channel: socket.socket) -> None:
    """Ends this process when the site's own is gone, also during a task: nobody waits for that any more."""

    def watch() -> None:
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLRDHUP)  # not what can be read: that is the main thread's
        poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)  # its ranks see that, and end

    threading.Thread(target=watch, name="shoal-watch", daemon=True).start()


def _end(_number: int, _frame: FrameType | None) -> None:
    """Is the handler of SIGTERM: the ranks are ended on the way out."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)


def _send(channel: socket.socket, answer: Parcel) -> None:
    fd = write_parcel(answer)
    try:
        send(channel, {"answer": True}, fd)
    finally:
        os.close(fd)


def main() -> None:
    """Is the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    [number] = sys.argv[1:]
    told = Told(**json.load(sys.stdin))
    with socket.socket(fileno=int(number)) as channel:
        channel.set_inheritable(False)
        _watch(channel)
        serve(channel, told)


if __name__ == "__main__":
    main()
