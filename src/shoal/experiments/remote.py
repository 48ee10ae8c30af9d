"""A federation of real sites, as the server's side runs it: an order, and what carries the messages."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from shoal.data import Population
from shoal.deploy.remote import SITES, RemoteEngine
from shoal.deploy.wire import Wire
from shoal.engines import SitesEngine
from shoal.errors import ConfigurationError
from shoal.experiments.at_site import digest
from shoal.experiments.loading import build, load
from shoal.federation import Experiment, FederationResult, run_experiment
from shoal.federation.callbacks import Callback
from shoal.federation.run import SITE_LOGS
from shoal.federation.site_population import SitePopulation
from shoal.sites.policy import SitePolicy


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the server is to run, as JSON."""

    experiment: str
    """A built-in experiment, a Python file, or the folder of an exported job, on the server's machine."""
    name: str
    """Under which the sites allow it."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The experiment's settings, as on the command line."""
    run_dir: str = ""
    """The run's folder on the server's machine."""
    resume: bool = False
    """Whether to go on with the run in it."""

    def to_json(self) -> str:
        """Returns it as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Returns the order that :meth:`to_json` wrote.

        Raises:
            ConfigurationError: It is none.
        """
        try:
            told: Any = json.loads(text)
            return cls(**{**told, "settings": {str(key): str(value) for key, value in told["settings"].items()}})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"that is no order for a server: {type(error).__name__}: {error}") from error


def run_over(wire: Wire, order: Order, callbacks: Sequence[Callback] = ()) -> FederationResult:
    """Runs a federation over the messages of another system; :func:`shoal.federate` says what is raised.

    Args:
        wire: Carries the messages.
        order: What to run.
        callbacks: Told of what happens.
    """
    experiment = build(load(order.experiment), order.settings)
    folder = Path(order.run_dir) if order.run_dir else None
    return run_experiment(remotely(experiment, wire, order), run_dir=folder, resume=order.resume, callbacks=callbacks)


def remotely(experiment: Experiment, wire: Wire, order: Order) -> Experiment:
    """Returns an experiment whose clients are sites at the other end of a wire.

    Raises:
        ConfigurationError: Its engine cannot be replaced by them.
    """
    run, attempt = _begun(Path(order.run_dir)) if order.resume else (secrets.token_hex(8), 0)
    engine = experiment.engine
    names: Sequence[str] | None = None
    clients: Any = experiment.clients
    if isinstance(engine, SitesEngine):
        names, policy = [site.name for site in engine.sites], engine.policy
        clients = SitePopulation(engine.sites)
    elif engine == "auto":
        count = len(clients) if isinstance(clients, Population | Sequence) else 1
        needed = (experiment.cohort or count) - experiment.max_failures
        policy = SitePolicy(on_failure="continue" if experiment.max_failures else "stop", min_sites=max(needed, 1))
    else:
        raise ConfigurationError(
            f"the experiment says engine={getattr(engine, 'name', engine)!r}, and its clients are to be real sites: "
            "leave the engine out"
        )
    remote = RemoteEngine(
        wire=wire,
        experiment=order.name,
        settings=order.settings,
        digest=digest(experiment.learner),
        run_name=run,
        attempt=attempt,
        names=names,
        policy=policy,
    )
    return dataclasses.replace(experiment, engine=remote, clients=clients)


def _begun(folder: Path) -> tuple[str, int]:
    """Returns the name of the run in a folder, and the number of the next attempt at it."""
    path = folder / SITE_LOGS / SITES
    if not path.exists():  # it ended before its first round
        return secrets.token_hex(8), 0
    told = json.loads(path.read_text(encoding="utf-8"))
    return str(told["run"]), int(told["attempt"]) + 1
