"""``shoal federate`` and ``shoal demo``."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.deployed import REMOTE, federate_at_sites
from shoal.cli.launch import among_workers, launch_if_asked
from shoal.cli.options import DataDir, Precision, RunDir, Seed, Trackers, check_resume
from shoal.cli.runs import in_new_folder, new_folders, resume_command
from shoal.errors import ConfigurationError, RunInterrupted

if TYPE_CHECKING:
    from shoal.federation import Experiment

Rounds = Annotated[int | None, typer.Option(help="Number of rounds.")]
Cohort = Annotated[int | None, typer.Option(help="Clients sampled for each round.")]
Clients = Annotated[int | None, typer.Option(help="Size of the population.")]
Engine = Annotated[
    str | None,
    typer.Option(help="Where a cohort runs: auto, sequential, vectorized, process; at real sites: flower, nvflare."),
]
Deployment = Annotated[
    Path | None, typer.Option(help="With --engine flower or nvflare: the folder of `shoal deploy up`.")
]
MaxConcurrent = Annotated[int | None, typer.Option(help="Clients that train at once, with --engine process.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, or cuda:1 for the second GPU.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir.")]
Workers = Annotated[int | None, typer.Option(help="Processes on this machine that share each cohort.")]
MaxRestarts = Annotated[int, typer.Option(help="How often to go on from the last checkpoint when a worker fails.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what every rank of every site writes.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any further setting, such as alpha=0.1 or algorithm=fedprox."),
]


def federate(
    experiment: Annotated[
        str,
        typer.Argument(help="A Python file, an exported job's folder, or digits, fashion_mnist, cifar10, synthetic."),
    ],
    rounds: Rounds = None,
    cohort: Cohort = None,
    clients: Clients = None,
    engine: Engine = None,
    max_concurrent: MaxConcurrent = None,
    device: Device = None,
    precision: Precision = None,
    seed: Seed = None,
    data_dir: DataDir = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    workers: Workers = None,
    max_restarts: MaxRestarts = 0,
    trackers: Trackers = None,
    verbose: Verbose = False,
    deployment: Deployment = None,
    settings: Set = None,
) -> None:
    """Train one model on the data of many clients."""
    if engine in REMOTE:
        check_resume(resume, run_dir)
        given = {"rounds": rounds, "cohort": cohort, "clients": clients, "seed": seed, "data_dir": data_dir}
        federate_at_sites(
            engine,
            experiment,
            _parsed(settings or []) | {key: str(value) for key, value in given.items() if value is not None},
            run_dir=run_dir,
            resume=resume,
            folder=deployment,
            refused={
                "--device": device, "--precision": precision, "--max-concurrent": max_concurrent,
                "--workers": workers, "--max-restarts": max_restarts, "--tracker": trackers, "--verbose": verbose,
            },
        )  # fmt: skip
        return
    if deployment is not None:
        raise ConfigurationError("--deployment is for real sites: say --engine flower or --engine nvflare too")
    options: dict[str, object] = {"rounds": rounds, "cohort": cohort, "clients": clients}
    options |= {"engine": engine, "engine.max_concurrent": max_concurrent, "seed": seed, "data_dir": data_dir}
    with among_workers():
        if max_restarts and run_dir is None:
            raise ConfigurationError("--max-restarts goes on from a run's folder: name it with --run-dir")
        launch_if_asked(workers, max_restarts=max_restarts)
        _run(
            experiment,
            options,
            settings or [],
            device=device,
            precision=precision,
            trackers=trackers or [],
            verbose=verbose,
            run_dir=run_dir,
            resume=resume,
        )


def demo(**options: Any) -> None:
    """Federate a small CNN over 100 clients with skewed shares of scikit-learn's digits."""
    federate("digits", **options)


# The demo takes every option of federate, and so it takes them from there.
_, *_options = inspect.signature(federate, eval_str=True).parameters.values()
demo.__signature__ = inspect.Signature(_options)  # type: ignore[attr-defined]
demo.__annotations__ = {option.name: option.annotation for option in _options}


def _run(
    name: str,
    options: dict[str, object],
    pairs: list[str],
    *,
    device: str | None,
    precision: str | None,
    trackers: list[str],
    verbose: bool,
    run_dir: Path | None,
    resume: bool,
) -> None:
    check_resume(resume, run_dir)
    from shoal.engines import launched_workers, restarted
    from shoal.experiments import build, load, parse_settings
    from shoal.runs import is_run

    given = {key: str(value) for key, value in options.items() if value is not None}
    experiment = build(load(name), parse_settings(pairs) | given)
    if device is not None or precision is not None:
        experiment = _on(experiment, device, precision)
    if verbose:
        experiment = _verbose(experiment)
    if trackers:
        experiment = dataclasses.replace(experiment, trackers=tuple(trackers))
    if run_dir is None and launched_workers():
        run_dir = next(new_folders(experiment.name))
    if run_dir is not None:
        _execute(experiment, run_dir, resume=resume or (restarted() and is_run(run_dir)))
        return
    in_new_folder(experiment.name, lambda path: _execute(experiment, path, resume=False))


def _execute(experiment: Experiment, path: Path, *, resume: bool) -> None:
    from shoal.federation import Progress, run_experiment

    try:
        run_experiment(experiment, run_dir=path, resume=resume, callbacks=[Progress()])
    except RunInterrupted as interrupt:
        message = f"{interrupt}; to go on: {resume_command(path)}"
        raise RunInterrupted(message) from interrupt.__cause__


def _verbose(experiment: Experiment) -> Experiment:
    """Returns the experiment with all that its sites write shown."""
    from shoal.engines import SitesEngine

    if not isinstance(experiment.engine, SitesEngine):
        raise ConfigurationError("--verbose shows what sites write, and this federation has none: leave it out")
    return dataclasses.replace(experiment, engine=dataclasses.replace(experiment.engine, verbose=True))


def _on(experiment: Experiment, device: str | None, precision: str | None) -> Experiment:
    """Returns the experiment on other devices than its own, in what was said of them."""
    from shoal.cli.devices import parse_device

    devices = experiment.learner.devices
    asked = parse_device(device or devices.accelerator, precision or devices.precision)
    if device is not None:
        devices = dataclasses.replace(devices, accelerator=asked.accelerator, ids=asked.ids)
    devices = dataclasses.replace(devices, precision=asked.precision)
    return dataclasses.replace(experiment, learner=experiment.learner.on(devices))


def _parsed(pairs: list[str]) -> dict[str, str]:
    from shoal.experiments import parse_settings

    return parse_settings(pairs)
