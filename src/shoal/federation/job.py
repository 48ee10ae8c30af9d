"""A federation of sites: a script, or a learner, that trains at each of them with processes and devices of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from shoal.algorithms import Algorithm, FedAvg
from shoal.client.learner import serve
from shoal.data import Population
from shoal.devices import Accelerator, Devices
from shoal.engines import SitesEngine
from shoal.errors import ConfigurationError, unknown_name
from shoal.federation.callbacks import Callback
from shoal.federation.experiment import Experiment, Settings
from shoal.federation.result import FederationResult
from shoal.federation.run import run_experiment
from shoal.federation.site_population import SitePopulation
from shoal.learners.base import Learner
from shoal.learners.script import ScriptLearner
from shoal.sites import Site
from shoal.sites.allotment import Allotment
from shoal.sites.policy import OnFailure, SitePolicy
from shoal.sites.process import Starter, start_forked, start_script
from shoal.sites.state import Deadlines

SETTINGS = frozenset(Settings.__annotations__) - {"client_validation", "validation_clients", "max_failures"}
"""The fields of an experiment that a job does not say itself, and that make sense where the clients are sites."""


@dataclass(frozen=True, eq=False)
class Job:
    """A federation whose clients are sites: each with its own processes, devices and settings.

    Example::

        sites = [shoal.Site("site-1", devices=2), shoal.Site("site-2", devices=2)]
        result = shoal.Job("digits", script="client.py", model=Net, sites=sites, rounds=5).run(run_dir="runs/digits")

    Raises:
        ConfigurationError: A value is out of its range, or the parts do not go together.
    """

    name: str
    """Heads the report."""
    _: KW_ONLY
    script: str | Path | None = None
    """The Python file that every rank of every site runs; see :func:`shoal.client.tasks`."""
    args: Sequence[str] = ()
    """Its arguments at all sites."""
    model: Any = None
    """What the federation starts from where a script trains: a torch module or a Keras model, or a function or class
    that makes one and is called with torch or Keras seeded; or arrays by name."""
    learner: Learner | None = None
    """In place of a script: trains at every site, on that site's devices and data."""
    sites: Sequence[Site]
    """The sites, at least one."""
    algorithm: Algorithm = field(default_factory=FedAvg)
    """The federated method."""
    rounds: int
    """Number of rounds, ≥ 1."""
    min_sites: int | None = None
    """With how many replies a round may go on, where sites are late or have failed; None for all, with which neither
    ``deadline`` nor ``on_failure="continue"`` can let a site be left out."""
    deadline: float | None = None
    """Seconds after which a round goes on without the sites that have not replied, if ``min_sites`` have; None to wait
    for all. What is late is thrown away, and the site takes part again when it is done. The clock
    of the first round starts when all sites have."""
    on_failure: OnFailure = "stop"
    """When a site fails: ``stop`` the run; ``continue`` without the site to the end, while there are ``min_sites``; or
    ``restart`` it, from the current global model."""
    max_restarts: int = 1
    """With ``restart``: how often one site is started again; one more failure stops the run."""
    waits: Deadlines = field(default_factory=Deadlines)
    """How long the server waits for starts, replies and signs of life before a site counts as failed."""
    accelerator: Accelerator = "auto"
    """Of the sites that do not say it themselves."""
    share_devices: bool = False
    """Whether sites may use the same CUDA device."""
    evaluate: Any = None
    """Held-out data that the server measures the global model on, where a learner trains."""
    seed: int = 0
    """Decides the first parameters and all randomness of learners; scripts find theirs in ``task.seed``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of :class:`~shoal.Experiment`, such as ``evaluate_every``, ``target`` or ``patience``."""

    def __post_init__(self) -> None:
        if (self.script is None) == (self.learner is None):
            raise ConfigurationError("a job has either a script=… or a learner=… for its sites")
        given: Any = self.sites
        if not isinstance(given, Sequence) or not all(isinstance(site, Site) for site in given):
            raise ConfigurationError(f"sites must be a list such as [shoal.Site('site-1'), …], not {given!r:.60}")
        if not self.sites:
            raise ConfigurationError("a job has at least one site: sites=[shoal.Site('site-1'), …]")
        names = [site.name for site in self.sites]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigurationError(f"two sites are called {min(twice)!r}: give each a name of its own")
        if self.min_sites is not None and not 1 <= self.min_sites <= len(self.sites):
            raise ConfigurationError(f"min_sites must be from 1 to {len(self.sites)}, not {self.min_sites}")
        if self.on_failure not in ("stop", "continue", "restart"):
            raise ConfigurationError(f"on_failure must be stop, continue or restart, not {self.on_failure!r}")
        if self.max_restarts < 0:
            raise ConfigurationError(f"max_restarts must be ≥ 0, not {self.max_restarts}")
        if self.deadline is not None and not self.deadline > 0:
            raise ConfigurationError(f"deadline must be > 0 seconds, not {self.deadline}")
        self._check_leniency()
        if unknown := sorted(set(self.settings) - SETTINGS):
            raise unknown_name("setting of a job", unknown[0], SETTINGS)
        if self.learner is not None:
            self._check_learner(self.learner)
        elif self.script is not None:
            self._check_script(Path(self.script))

    def _check_leniency(self) -> None:
        """Refuses what would let a round go on without some sites, where nothing says that it may."""
        lenient = {"deadline": self.deadline is not None, "on_failure": self.on_failure == "continue"}
        name = next((name for name, asked in lenient.items() if asked), None)
        if name is not None and self.min_sites is None:
            raise ConfigurationError(
                f"{name}={getattr(self, name)!r} lets a round go on without some sites: "
                f"say with how many at least, as in min_sites={max(len(self.sites) - 1, 1)}"
            )

    def _check_learner(self, learner: Learner) -> None:
        for site in self.sites:
            learner.on(site.spread)  # refused here, if it cannot be
            if site.data is None:
                raise ConfigurationError(f"{site.name} has no data for the learner: Site({site.name!r}, data=…)")
            if site.python or site.args or site.command:
                raise ConfigurationError(f"python, args and command of {site.name} are for a script, not for a learner")

    def _check_script(self, script: Path) -> None:
        if not script.is_file():
            raise ConfigurationError(f"there is no script {script}")
        if self.model is None:
            raise ConfigurationError("the model=… that the sites start from is missing: a module, or what makes one")
        if self.evaluate is not None:
            raise ConfigurationError("evaluate=… is for a learner: a script measures at its sites, in its own way")
        for site in self.sites:
            if site.data is not None or site.evaluate is not None:
                raise ConfigurationError(f"data of {site.name} are for a learner: a script reads its own")

    def run(
        self,
        *,
        run_dir: str | Path | None = None,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
        verbose: bool = False,
    ) -> FederationResult:
        """Starts the sites, runs the federation, and ends them.

        Args:
            run_dir: The run's folder; None to keep everything in memory.
            resume: Go on with the run that ``run_dir`` holds.
            callbacks: Told of what happens; ``shoal.Progress()`` shows it.
            verbose: Whether to show what every rank writes, and not only each site's rank 0.

        Raises:
            ConfigurationError: Something was asked for that cannot be; nothing was written.
            SiteError: A site failed, and ``on_failure`` does not allow for it; all processes have ended.
            ClientError: Too few sites replied in time.
            StorageError: The run folder cannot be written.
            RunInterrupted: Ctrl-C or SIGTERM came; the state is saved, and all processes have ended.
        """
        return run_experiment(self.experiment(verbose=verbose), run_dir=run_dir, resume=resume, callbacks=callbacks)

    def export(self, folder: str | Path) -> None:
        """Writes all that the job needs into a new folder, for ``shoal federate FOLDER``.

        That is the script and the modules beside it that it imports, the model that the federation starts from, and
        all settings as JSON.

        Raises:
            ConfigurationError: The job has a learner, or a setting that is no JSON; or the folder is not empty.
            StorageError: The folder cannot be written.
        """
        from shoal.federation.job_files import export_job

        export_job(self, Path(folder))

    def experiment(self, *, verbose: bool = False) -> Experiment:
        """Returns the job as an experiment, whose clients are the sites and whose engine starts them.

        Args:
            verbose: Whether to show what every rank writes, and not only each site's rank 0.
        """
        learner, clients, starter = self._parts()
        allowed = len(self.sites) - (self.min_sites or len(self.sites))
        engine = SitesEngine(
            sites=self.sites,
            starter=starter,
            allotment=Allotment(accelerator=self.accelerator, share_devices=self.share_devices),
            policy=SitePolicy(
                on_failure=self.on_failure,
                max_restarts=self.max_restarts,
                min_sites=self.min_sites or len(self.sites),
                deadline=self.deadline,
                waits=self.waits,
            ),
            verbose=verbose,
        )
        return Experiment(
            learner=learner,
            clients=clients,
            rounds=self.rounds,
            algorithm=self.algorithm,
            engine=engine,
            seed=self.seed,
            name=self.name,
            evaluate=self.evaluate,
            max_failures=allowed,
            **self.settings,
        )

    def _parts(self) -> tuple[Learner, Population, Starter]:
        """Returns the learner and the clients as the server sees them, and what starts the sites."""
        if self.learner is None:
            script = Path(self.script or "").resolve()
            starter = start_script(str(script), [str(word) for word in self.args])
            learner = ScriptLearner(script, self.model, tuple(map(str, self.args)))
            return learner, SitePopulation(self.sites), starter
        own = self.learner
        clients: Population
        if any(site.fetches for site in self.sites):
            clients = SitePopulation(self.sites)
        else:
            names = [site.name for site in self.sites]
            clients = Population.from_datasets([site.data for site in self.sites], names=names)
        return (
            own.on(Devices(accelerator="cpu", precision=own.devices.precision)),
            clients,
            start_learner(own),
        )


def start_learner(learner: Learner) -> Starter:
    """Returns what starts sites whose ranks train with a learner, on the devices of each."""
    return start_forked(partial(_run_site, learner))


def _run_site(learner: Learner, site: Site) -> None:
    # A site's processes see its own CUDA devices alone, counted from 0.
    serve(learner.on(replace(site.spread, ids=None, precision=learner.devices.precision)), site)
