"""The entry points: from an experiment, or from its parts, to a result."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from shoal import trees
from shoal.algorithms import Algorithm, FedAvg
from shoal.data import Population
from shoal.description import describe
from shoal.engines import Engine, SiteEngine, Workers
from shoal.errors import ConfigurationError
from shoal.federation.callbacks import Callback
from shoal.federation.experiment import Experiment, Settings
from shoal.federation.loop import FederationLoop
from shoal.federation.preparation import Plan, partition_picture, prepare
from shoal.federation.result import FederationResult
from shoal.federation.storage import RunStorage
from shoal.federation.together import agree, follow
from shoal.learners.base import Learner
from shoal.runs import RunFolder, environment, require_tensorboard, require_trackers, sigterm_raised

SITE_LOGS = "sites"
"""The folder with the sites' logs in that of the run."""


def federate(
    learner: Learner,
    clients: Population | Sequence[Any],
    *,
    rounds: int,
    cohort: int | None = None,
    algorithm: Algorithm | None = None,
    engine: str | Engine = "auto",
    seed: int = 0,
    name: str = "federation",
    evaluate: Any = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Unpack[Settings],
) -> FederationResult:
    """Trains one model on the data of many clients.

    Example::

        clients = shoal.data.partition(dataset, shoal.data.Dirichlet(clients=1000, alpha=0.3), seed=0)
        result = shoal.federate(learner, clients, rounds=200, cohort=100, evaluate=test_set, run_dir="runs/demo")

    Args:
        learner: Trains and evaluates the model on one client's data.
        clients: The population, or one data set (arrays, a torch data set) for each client.
        rounds: Number of rounds.
        cohort: Clients sampled for each round; None for all.
        algorithm: The federated method; None for FedAvg.
        engine: Where a cohort runs.
        seed: Decides all randomness of the run.
        name: Heads the report.
        evaluate: Held-out data to measure the global model on.
        run_dir: The run's folder; None to keep everything in memory.
        resume: Go on with the run that ``run_dir`` holds.
        callbacks: Told of what happens; ``shoal.Progress()`` shows it.
        settings: Any further field of :class:`~shoal.Experiment`, such as ``evaluate_every`` or ``max_failures``.

    Raises:
        ConfigurationError: Something was asked for that cannot be; nothing was written.
        ClientError: More clients of a round failed than ``max_failures``.
        EngineError: A process that the engine relies on has ended.
        NonFiniteError: A step would have made the global model NaN or infinite.
        StorageError: The run folder cannot be written.
        RunInterrupted: Ctrl-C or SIGTERM came; the state is saved.
    """
    experiment = Experiment(
        learner=learner,
        clients=clients,
        rounds=rounds,
        cohort=cohort,
        algorithm=algorithm or FedAvg(),
        engine=engine,
        seed=seed,
        name=name,
        evaluate=evaluate,
        **settings,
    )
    return run_experiment(experiment, run_dir=run_dir, resume=resume, callbacks=callbacks)


def run_experiment(
    experiment: Experiment,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> FederationResult:
    """Runs an experiment; :func:`federate` says what is raised.

    Args:
        experiment: What to run.
        run_dir: The run's folder; None to keep everything in memory.
        resume: Go on with the run that ``run_dir`` holds.
        callbacks: Told of what happens.

    Where a launcher such as torchrun has started several workers, all call this function with the same arguments. They
    share the cohorts; worker 0 alone measures, writes the folder and tells the callbacks.
    """
    if experiment.trackers and run_dir is None:
        raise ConfigurationError("trackers follow the run folder: name one with run_dir=…")
    with sigterm_raised(), Workers.join():
        if isinstance(experiment.engine, SiteEngine):
            experiment.engine.rounds = experiment.rounds
        plan = prepare(experiment)
        with contextlib.closing(plan.engine):
            if plan.team is not None:
                agree(plan, plan.team)
                if not plan.leads:
                    return follow(plan, plan.team)
            return _run(plan, run_dir, resume=resume, callbacks=callbacks)


def _run(plan: Plan, run_dir: str | Path | None, *, resume: bool, callbacks: Sequence[Callback]) -> FederationResult:
    folder = None if run_dir is None else _open_folder(plan, Path(run_dir), resume=resume)
    with RunStorage(folder, keep=plan.experiment.keep_checkpoints) as storage:
        if folder is not None and isinstance(plan.engine, SiteEngine):
            plan.engine.keep_logs(folder.path / SITE_LOGS)
        storage.save_partition(partition_picture(plan.shards.population))
        result = FederationLoop(plan, storage, callbacks).run()
    if isinstance(plan.engine, SiteEngine):
        plan.engine.finish()
    return result


def _open_folder(plan: Plan, path: Path, *, resume: bool) -> RunFolder:
    experiment = plan.experiment
    if experiment.tensorboard:
        require_tensorboard()
    require_trackers(experiment.trackers)
    config = {
        "identity": plan.identity,
        "options": experiment.options(),
        "environment": environment(
            seed=experiment.seed, engine=plan.engine.name, devices=describe(experiment.learner.devices)
        ),
    }
    state = plan.start
    bytes_a_checkpoint = trees.nbytes(state.model.merged()) + sum(trees.nbytes(slot) for slot in state.slots.values())
    needed = bytes_a_checkpoint * (experiment.keep_checkpoints + 2)  # the best one, and one while it is written
    return RunFolder.open(path, config, resume=resume, space=needed)
