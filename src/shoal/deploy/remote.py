"""The engine of real sites: shoal's federation over the messages of Flower or NVFlare."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal import trees
from shoal.data import Population
from shoal.deploy.answer import Answer
from shoal.deploy.asking import Asking
from shoal.deploy.parcel import Parcel, RawTensor, raw_tree
from shoal.deploy.request import Request
from shoal.deploy.roster import Roster, in_order
from shoal.deploy.spool import spooled
from shoal.deploy.wire import Wire
from shoal.engine import ClientResult, ClientTask
from shoal.errors import ClientError, ConfigurationError, ShoalError, SiteError
from shoal.learners.base import Learner
from shoal.learners.script import ties_at_server
from shoal.processes.memory import give_large_memory_back
from shoal.runs.files import storing, write_json
from shoal.sites.policy import SitePolicy
from shoal.sites.state import Reply
from shoal.sites.task import SiteTask
from shoal.types import Broadcast, ModelState

logger = logging.getLogger("shoal")

LOOK = 0.25
"""Seconds between two looks at the sites."""

PARTING = 10.0
"""Seconds in which the sites must have heard that the run ends, where it ends early."""

MOST_EXAMPLES = 1e15
"""No site has so many examples. A larger weight would take the mean for itself, or make the sum of all infinite."""

SITES = "sites.json"
"""The file that says which client each site is, beside what else is kept of the sites."""


@dataclass
class RemoteEngine:
    """Runs each client as a site somewhere else, over the messages of another system.

    Args:
        wire: Carries the messages.
        experiment: The name under which the sites allow the experiment.
        settings: The experiment's, which the sites are told.
        digest: Of the learner; a site with another one refuses.
        run_name: The run's own, the same after a resume.
        attempt: How often it was started before.
        names: The sites, in the order of the clients; None to take those that come, by their names.
        policy: What to do about failures.
    """

    wire: Wire
    experiment: str
    settings: Mapping[str, str]
    digest: str
    run_name: str
    attempt: int = 0
    names: Sequence[str] | None = None
    policy: SitePolicy = field(default_factory=SitePolicy)
    rounds: int = 0
    """How many rounds the federation has, which the sites are told."""

    def __post_init__(self) -> None:
        self.name = self.wire.name
        self.seconds: dict[int, float] = {}
        """How long each site of the last round worked at its task, by client."""
        self._clients: dict[str, int] = {}
        self._roster: Roster | None = None
        self._ties: dict[str, str] | None = None
        self._kept: list[Reply] = []
        self._number = 0

    def open(self, learner: Learner, clients: Population) -> None:  # noqa: ARG002 - the sites have their own data
        """Waits for the sites, and has them make ready.

        Raises:
            ConfigurationError: A site refuses, or there are more than clients.
            SiteError: Too few sites came in time.
            EngineError: What carries the messages is gone.
        """
        give_large_memory_back()
        hello = self._request("hello")
        self._roster = roster = Roster(self.wire, hello.to_json(), self.names)
        self._await_sites(roster, len(clients))
        names = self.names or in_order(roster.present)
        if len(names) > len(clients):
            raise ConfigurationError(
                f"{len(names)} sites are there and the experiment has {len(clients)} clients, one for each site: "
                f"make it {len(names)} clients"
            )
        self._clients = {name: client for client, name in enumerate(names)}
        roster.begin(list(names))
        for client, answer, problem in self._ask(self._request("hello"), {}, self._here(), self.policy.waits.start):
            name = self._name_of(client)
            if answer is None:
                logger.warning("%s did not make ready: %s", name, problem)
                continue
            roster.members[name].evaluates = Answer.from_json(answer.meta).evaluates

    def run(self, learner: Learner, broadcast: Broadcast, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Yields what each site replies, as the replies come."""
        self._let_go()
        self.seconds = {}
        ties = self._ties_of(learner, broadcast.model)
        seed = tasks[0].seed if tasks else 0
        work = SiteTask("train", broadcast, ties=ties, seed=seed)
        request = replace(self._request("train"), **_told(broadcast), ties=ties, seed=seed)
        clients = [task.client for task in tasks]
        arrays = _arrays(broadcast)
        for client, answer, problem in self._ask(request, arrays, clients, self.policy.waits.reply):
            if answer is None:
                yield ClientResult(client=client, error=problem)
                continue
            yield self._result(client, answer, work)

    def close(self) -> None:
        """Lets go of everything; sites that were not told of the end end their ranks by themselves."""
        self._let_go()
        if self._roster is not None and self._clients:
            self._say_end(self._roster)
        self._roster = None

    def finish(self) -> None:
        """Tells the sites that the federation is over, and waits for their scripts to end by themselves."""
        patient = self.policy.waits.finish
        policy = replace(self.policy, on_failure="continue", min_sites=0, deadline=patient)
        try:
            for client, answer, problem in self._ask(
                self._request("end"), {}, self._here(), patient, lenient=True, policy=policy
            ):
                if answer is None:
                    logger.warning("after the last round, %s: %s", self._name_of(client), problem)
        except ShoalError as error:  # the federation is done, and its model written
            logger.warning("after the last round, the sites could not be told of the end: %s", error)
        self._clients = {}

    def measure(self, learner: Learner, model: ModelState, round: int) -> dict[int, tuple[float, Mapping[str, float]]]:
        """Has the sites that can measure a model; returns each one's number of examples and means, by client.

        Args:
            learner: Knows the names of the model's arrays.
            model: The global model.
            round: Whose model it is.

        Raises:
            SiteError: A site failed, and the policy is to stop.
        """
        self._let_go()
        broadcast = Broadcast(round=round, model=model)
        clients = [client for client in self._here() if self._opened().members[self._name_of(client)].evaluates]
        request = replace(self._request("evaluate"), **_told(broadcast), ties=self._ties_of(learner, model))
        found: dict[int, tuple[float, Mapping[str, float]]] = {}
        for client, answer, _ in self._ask(request, _arrays(broadcast), clients, self.policy.waits.reply):
            if answer is None:
                continue
            said = Answer.from_json(answer.meta)
            if problem := _miscounted(said.examples):
                logger.warning("%s is left out of round %d's evaluation: %s", self._name_of(client), round, problem)
            else:
                found[client] = (said.examples, said.metrics)
        return found

    def keep_logs(self, folder: Path) -> None:
        """Writes which client each site is; their logs stay at the sites.

        Raises:
            StorageError: That cannot be written.
            ConfigurationError: The run was begun with other sites.
        """
        path = folder / SITES
        told = {"run": self.run_name, "attempt": self.attempt, "clients": self._clients}
        if path.exists():
            before = read_sites(path)["clients"]
            if before != self._clients:
                raise ConfigurationError(
                    f"this run was begun with the sites {', '.join(before)}, and {', '.join(self._clients)} are there"
                )
        with storing(path):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(path, told)

    def _await_sites(self, roster: Roster, wanted: int) -> None:
        """Waits until all sites are there; at the end of the time as many as a round needs are enough."""
        until = time.monotonic() + self.policy.waits.start
        while len(roster.present) < wanted:
            roster.look()
            for ticket, answer in self.wire.receive(LOOK):
                roster.take(ticket, answer)
            if time.monotonic() < until:
                continue
            there = in_order(roster.present)
            if self.names is not None and len(there) >= self.policy.min_sites and self.policy.min_sites < wanted:
                logger.warning("%d of %d sites are there; the federation begins with them", len(there), wanted)
                return
            missing = [name for name in self.names or () if name not in there]
            who = f": {', '.join(missing)}" if missing else f" ({', '.join(there) or 'none'} came)"
            raise SiteError(
                f"of {wanted} sites {wanted - len(there)} did not come within {self.policy.waits.start:g} s{who}; "
                f"see to it that `shoal site` and the client of {self.name} run there"
            )

    def _here(self) -> list[int]:
        """Returns the clients whose sites are there."""
        return sorted(self._clients[name] for name in self._opened().present if name in self._clients)

    def _ask(
        self,
        request: Request,
        arrays: Mapping[str, RawTensor],
        clients: Collection[int],
        within: float,
        *,
        lenient: bool = False,
        policy: SitePolicy | None = None,
    ) -> Iterator[tuple[int, Parcel | None, Exception | None]]:
        """Asks sites, and yields each one's answer, or why there is none.

        Raises:
            SiteError: A site failed, and the policy is to stop.
        """
        self._number += 1
        request = replace(request, number=self._number, clients=self._clients, seconds=within)
        parcel = Parcel(meta=request.to_json(), tensors=arrays)
        asking = Asking(
            self.wire,
            self._opened(),
            parcel,
            {self._name_of(client): client for client in clients},
            number=self._number,
            policy=policy or self.policy,
            within=within,
            lenient=lenient or self.policy.min_sites < len(clients),
        )
        yield from asking.answers()

    def _result(self, client: int, answer: Parcel, work: SiteTask) -> ClientResult:
        said = Answer.from_json(answer.meta)
        self.seconds[client] = said.seconds
        self._opened().members[self._name_of(client)].evaluates = said.evaluates
        if problem := _miscounted(said.examples):
            return ClientResult(client=client, error=ClientError(problem))
        try:
            with storing(Path(tempfile.gettempdir())):
                file = spooled(Parcel(meta={}, tensors=answer.tensors)) if said.tree else None
        except ValueError as error:  # such as arrays by a name that the format keeps for itself
            return ClientResult(client=client, error=SiteError(f"{self._name_of(client)}: {error}"))
        reply = Reply(task=said.number, examples=said.examples, metrics=said.metrics, tree=said.tree, file=file)
        self._kept.append(reply)
        if problem := work.problem(reply):
            return ClientResult(client=client, error=SiteError(f"{self._name_of(client)}: {problem}"))
        return ClientResult(client=client, update=work.update(reply), checked=True, lasting=True)

    def _request(self, kind: str) -> Request:
        return Request(
            kind=kind,  # type: ignore[arg-type]
            run=self.run_name,
            attempt=self.attempt,
            experiment=self.experiment,
            settings=self.settings,
            digest=self.digest,
            clients=self._clients,
            rounds=self.rounds,
        )

    def _say_end(self, roster: Roster) -> None:
        """Tells the sites of the end, so that they are free for another run; this process goes on soon in any case."""
        self._number += 1
        request = replace(self._request("end"), number=self._number)
        to = [member.address for member in roster.members.values() if member.address is not None]
        until = time.monotonic() + PARTING
        try:
            waiting = set(self.wire.send(to, Parcel(meta=request.to_json())).values())
            while waiting and time.monotonic() < until:  # what this process has sent may end with it
                waiting -= {ticket for ticket, _ in self.wire.receive(LOOK)}
        except Exception as error:  # it is the end anyway
            logger.warning("the sites could not be told of the end: %s", error)

    def _ties_of(self, learner: Learner, model: ModelState) -> dict[str, str]:
        if self._ties is None:
            self._ties = ties_at_server(learner, model)
        return self._ties

    def _let_go(self) -> None:
        while self._kept:
            self._kept.pop().close()

    def _name_of(self, client: int) -> str:
        return next(name for name, index in self._clients.items() if index == client)

    def _opened(self) -> Roster:
        if self._roster is None:
            raise ConfigurationError(f"engine {self.name!r} is not open")
        return self._roster


def read_sites(path: Path) -> dict[str, Any]:
    """Returns what :meth:`RemoteEngine.keep_logs` has written: the run's name, the attempt, and the clients by name.

    Raises:
        ConfigurationError: It cannot be read.
    """
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"run": str(told["run"]), "attempt": int(told["attempt"]), "clients": dict(told["clients"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} does not say which sites the run has: {error}") from error


def _miscounted(examples: float) -> str | None:
    """Says that no site has so many examples, which its answer is weighed by; None where one may."""
    return None if 0 < examples < MOST_EXAMPLES else f"it replied with {examples:g} examples"


def _told(broadcast: Broadcast) -> dict[str, Any]:
    """Returns what a request says of a broadcast."""
    objective = broadcast.objective
    return {
        "round": broadcast.round,
        "proximal": float(objective.proximal),
        "corrected": objective.correction is not None,
        "framework": trees.framework(broadcast.model.params),
    }


def _arrays(broadcast: Broadcast) -> dict[str, RawTensor]:
    """Returns the arrays of a broadcast by role and name, as bytes."""
    model = broadcast.model
    parts = {"params": model.params, "buffers": model.buffers, "constants": model.constants}
    return raw_tree(trees.flatten({**parts, "correction": broadcast.objective.correction or {}}))
