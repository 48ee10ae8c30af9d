"""From an experiment to everything a round needs; whatever is wrong shows here, before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shoal import trees
from shoal.algorithms import ServerState
from shoal.data import Dataset, Population, Subset, as_dataset
from shoal.engines import DistributedEngine, Engine, SiteEngine, choose_engine
from shoal.errors import unknown_name
from shoal.federation.cohorts import ClientShards, sample_cohort
from shoal.federation.evaluation import Evaluator
from shoal.federation.experiment import Experiment
from shoal.federation.site_population import SitePopulation
from shoal.processes.memory import resident
from shoal.types import ModelState

PICTURED_CLIENTS = 200
"""How many clients the partition picture shows; more would be thinner than a pixel."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """An experiment that has been checked, and what its rounds need."""

    experiment: Experiment
    """As the user gave it."""
    engine: Engine
    """Runs the cohorts."""
    engine_choice: str
    """Which engine that is and why, in one line."""
    shards: ClientShards
    """The clients' data."""
    cohort: int
    """Number of clients in a round."""
    evaluator: Evaluator
    """Measures the global model; false where nothing is to be measured."""
    identity: dict[str, Any]
    """What decides the run's numbers, as JSON."""
    memory_before: int = 0
    """Bytes that this process had before anything was made for the run."""
    first: list[ServerState]
    """Holds :attr:`start` until it is taken out, so that a run need not keep the model that it has left behind."""

    @property
    def start(self) -> ServerState:
        """The method's state before the first round."""
        return self.first[0]

    @property
    def team(self) -> DistributedEngine | None:
        """The engine, where it shares the cohorts with other processes."""
        return self.engine if isinstance(self.engine, DistributedEngine) else None

    @property
    def leads(self) -> bool:
        """Whether this process decides when a round begins, and stores and speaks."""
        return self.team is None or self.team.workers.leads


def prepare(experiment: Experiment) -> Plan:
    """Checks an experiment against its data and makes what its rounds need; the plan's engine is open.

    Raises:
        ConfigurationError: The cohort is larger than the population, or a name does not exist.
        DataError: There are no clients, a client is empty, a number is not finite, a label is out of range, or the
            model does not take the data.
    """
    before = resident()
    population = _population(experiment.clients)
    population.check()
    # Sites are processes that start when their engine is opened: what can be refused before is.
    early = isinstance(experiment.engine, SiteEngine) and not getattr(experiment.learner, "forks_first", False)
    made = _made(experiment, population) if early else None
    engine, choice = choose_engine(experiment.engine, experiment.learner, population)
    try:
        plan = _prepare(experiment, population, (engine, choice), made or _made(experiment, population))
        return replace(plan, memory_before=before)
    except BaseException:
        engine.close()
        raise


def _made(experiment: Experiment, population: Population) -> tuple[Dataset | None, ModelState]:
    """Returns the held-out data and the model before training, checked against each other and the population."""
    sample_cohort(len(population), _cohort(experiment, population), seed=experiment.seed, round=1)
    held_out = None if experiment.evaluate is None else as_dataset(experiment.evaluate)
    if held_out is not None:
        held_out.check()
    model = experiment.learner.init(experiment.seed)
    if not isinstance(population, SitePopulation):  # else the data are elsewhere
        experiment.learner.check(population.dataset)
    if held_out is not None:
        experiment.learner.check(held_out)
    return held_out, model


def _cohort(experiment: Experiment, population: Population) -> int:
    return len(population) if experiment.cohort is None else experiment.cohort


def _prepare(
    experiment: Experiment,
    population: Population,
    chosen: tuple[Engine, str],
    made: tuple[Dataset | None, ModelState],
) -> Plan:
    engine, choice = chosen
    held_out, model = made
    shards = ClientShards(population, validation=experiment.client_validation, seed=experiment.seed)
    panel = shards.panel(experiment.validation_clients) if experiment.client_validation else []
    sites = engine if isinstance(engine, SiteEngine) else None
    evaluator = Evaluator(experiment.learner, held_out, shards, panel, sites)
    if sites is None:  # else what is measured shows when the sites do so
        sample = population[0] if held_out is None else held_out
        _check_metric(experiment, model, sample, held_out=held_out is not None, panel=bool(panel))
    return Plan(
        experiment=experiment,
        engine=engine,
        engine_choice=choice,
        shards=shards,
        cohort=_cohort(experiment, population),
        evaluator=evaluator,
        first=[experiment.algorithm.start(model)],
        identity=experiment.identity(population, held_out) | {"model": _signature(model)},
    )


def partition_picture(population: Population) -> dict[str, Any] | None:
    """Returns how the labels lie over the clients, as JSON for the report: at most 200 clients, evenly picked.

    None where the targets are no classes, or are not known without reading every sample.
    """
    shown = np.unique(np.linspace(0, len(population) - 1, PICTURED_CLIENTS).astype(int)).tolist()
    counts = population.label_counts(shown)
    if counts is None:
        return None
    sizes = population.sizes
    return {
        "clients": shown,
        "labels": list(range(counts.shape[1])),
        "counts": counts.tolist(),
        "sizes": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())},
        "total_clients": len(population),
        "description": population.title,
    }


def _population(clients: Population | Sequence[Any]) -> Population:
    return clients if isinstance(clients, Population) else Population.from_datasets(clients)


def _check_metric(experiment: Experiment, model: ModelState, data: Dataset, *, held_out: bool, panel: bool) -> None:
    """Measures two examples, so that a metric that does not exist is refused now and not after the first round."""
    if experiment.metric is None:
        return
    names = list(experiment.learner.evaluate(model, Subset(data, np.arange(min(2, len(data))))))
    known = (names if held_out else []) + ([f"client_{name}" for name in names] if panel else [])
    if experiment.metric not in known:
        raise unknown_name("metric", experiment.metric, known)


def _signature(model: ModelState) -> str:
    """Returns a digest of the names, shapes and dtypes of a model's arrays."""
    rows = sorted((name, tuple(array.shape), str(array.dtype)) for name, array in model.merged().items())
    return hashlib.sha256(repr((rows, trees.framework(model.params))).encode()).hexdigest()
