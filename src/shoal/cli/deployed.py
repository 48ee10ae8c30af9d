"""``shoal federate --engine flower`` or ``nvflare``: the federation runs at real sites."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.deploy import deployment, local_of
from shoal.cli.runs import new_folders, resume_command
from shoal.errors import ConfigurationError, RunInterrupted

if TYPE_CHECKING:
    from shoal.deploy.order import Order

REMOTE = ("flower", "nvflare")
"""The engines whose clients are real sites."""


def federate_at_sites(
    engine: str,
    name: str,
    settings: Mapping[str, str],
    *,
    run_dir: Path | None,
    resume: bool,
    folder: Path | None,
    refused: Mapping[str, Any],
) -> None:
    """Runs an experiment at the sites of a deployment on this machine, and shows what happens.

    Args:
        engine: ``flower`` or ``nvflare``.
        name: The experiment, as on the command line.
        settings: Its settings.
        run_dir: The run's folder; None for a new one.
        resume: Whether to go on with the run in it.
        folder: The deployment's; None for the one in ``.shoal``.
        refused: Options by name that are the sites' own, with what was said.

    Raises:
        ConfigurationError: There is no such deployment, or something was asked for that cannot be.
        EngineError: The run did not end well.
        RunInterrupted: Ctrl-C came.
    """
    from shoal.deploy.order import Order
    from shoal.experiments import build, load
    from shoal.experiments.sources import absolute, allowed_name
    from shoal.runs import RunFolder

    if given := [option for option, value in refused.items() if value]:
        raise ConfigurationError(
            f"{given[0]} is the sites' own affair with --engine {engine}: leave it out, or say it in their site.toml"
        )
    local_of(engine)  # refuses an engine that is not installed
    place = deployment(engine, folder)
    experiment = build(load(name), settings)  # what cannot be is refused here, before anything starts
    path = (run_dir or next(new_folders(experiment.name))).resolve()
    RunFolder.check(path, resume=resume)
    order = Order(
        experiment=absolute(name), name=allowed_name(name), settings=settings, run_dir=str(path), resume=resume
    )
    try:
        with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
            _submit(engine, place, order, Path(scratch))
    except RunInterrupted as interrupt:
        raise RunInterrupted(f"{interrupt}; to go on: {resume_command(path)}") from interrupt.__cause__
    print(f"the run is in {path}")


def _submit(engine: str, place: Path, order: Order, scratch: Path) -> None:
    if engine == "flower":
        from shoal.deploy.flower_app import write_app
        from shoal.deploy.flower_submit import submit
        from shoal.deploy.flower_tools import CONNECTION

        write_app(scratch / "app", order=order.to_json(), name=order.name, files={})
        submit(place, scratch / "app", connection=CONNECTION, show=print)
        return
    from shoal.deploy.nvflare_job import write_job
    from shoal.deploy.nvflare_submit import submit as submit_job

    write_job(scratch / "job", order=order.to_json(), name=order.name, own_code=False)
    submit_job(place, scratch / "job", show=print, within=None, run_dir=Path(order.run_dir))
