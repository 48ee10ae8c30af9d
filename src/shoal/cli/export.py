"""``shoal export``: an experiment as what Flower or NVFlare runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.options import check_resume
from shoal.errors import unknown_name

TARGETS = ("flower", "nvflare")


def export(
    experiment: Annotated[
        str,
        typer.Argument(help="A Python file, an exported job's folder, or digits, fashion_mnist, cifar10, synthetic."),
    ],
    folder: Annotated[Path, typer.Argument(help="A new folder for the app or the job.")],
    to: Annotated[str, typer.Option(help="flower for an app of `flwr run`, nvflare for a job folder.")],
    name: Annotated[
        str | None, typer.Option(help="Under which the sites allow it; the file's own if left out.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Where the experiment lies on the server's machine, in place of carrying its files along."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="The run's folder on the server's machine; a new one if left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Have the server go on with the run in --run-dir.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as rounds=5 or lr=0.1.")
    ] = None,
) -> None:
    """Write an experiment as a Flower app or an NVFlare job, for real sites."""
    from shoal.deploy.order import Order
    from shoal.experiments import BUILT_IN, build, load, parse_settings
    from shoal.experiments.sources import allowed_name, files_of

    check_resume(resume, run_dir)
    if to not in TARGETS:
        raise unknown_name("target of an export", to, TARGETS)
    chosen = parse_settings(settings or [])
    files = {} if at else files_of(experiment)
    build(load(experiment), chosen)  # what cannot be is refused before anything is written
    order = Order(
        experiment=at or (experiment if experiment in BUILT_IN else Path(experiment).resolve().name),
        name=name or allowed_name(experiment),
        settings=chosen,
        run_dir="" if run_dir is None else str(run_dir),
        resume=resume,
    )
    if to == "flower":
        from shoal.deploy.flower_app import write_app

        write_app(folder, order=order.to_json(), name=order.name, files=files)
        print(f"{folder} is a Flower app: shoal submit {folder} SUPERLINK, or flwr run {folder} SUPERLINK")
        return
    from shoal.deploy.nvflare_job import write_job

    write_job(folder, order=order.to_json(), name=order.name, files=files, own_code=at is None)
    print(f"{folder} is an NVFlare job: shoal submit {folder} STARTUP_KIT, or nvflare job submit -j {folder}")
