"""A federation of real sites, as the server's side runs it: an order, and what carries the messages."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.data import Population
from shoal.deploy.order import Order
from shoal.deploy.remote import SITES, RemoteEngine, read_sites
from shoal.deploy.wire import Wire
from shoal.engines import SitesEngine
from shoal.errors import ConfigurationError
from shoal.experiments.at_site import digest
from shoal.experiments.loading import build, load
from shoal.federation import Experiment, FederationResult, run_experiment
from shoal.federation.callbacks import Callback
from shoal.federation.run import SITE_LOGS
from shoal.federation.site_population import SitePopulation
from shoal.runs import RunFolder
from shoal.sites.policy import SitePolicy


def run_over(wire: Wire, order: Order, callbacks: Sequence[Callback] = ()) -> FederationResult:
    """Runs a federation over the messages of another system; :func:`shoal.federate` says what is raised.

    Args:
        wire: Carries the messages.
        order: What to run.
        callbacks: Told of what happens.
    """
    experiment = build(load(order.experiment), order.settings)
    folder = Path(order.run_dir) if order.run_dir else None
    if folder is not None:  # or the sites would hear of a second server of the same run
        RunFolder.check(folder, resume=order.resume)
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
    told = read_sites(path)
    return told["run"], told["attempt"] + 1
