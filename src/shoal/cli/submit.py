"""``shoal submit``: an exported app or job runs on a server somewhere else, and its run comes home."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.deploy import local_of
from shoal.cli.options import RunDir
from shoal.cli.runs import new_folders
from shoal.errors import ConfigurationError, RunFolderError


def submit(
    folder: Annotated[Path, typer.Argument(help="A Flower app or an NVFlare job, as `shoal export` has written it.")],
    server: Annotated[
        str,
        typer.Argument(
            help="A SuperLink's name in Flower's configuration, or an administrator's startup kit of NVFlare."
        ),
    ],
    run_dir: RunDir = None,
) -> None:
    """Run an exported federation on a server elsewhere, and bring its run folder back."""
    from shoal.deploy.order import Order
    from shoal.runs.files import is_taken, storing

    engine, text = _exported(folder)
    local_of(engine)  # refuses an engine that is not installed
    order = Order.from_json(text)
    path = (run_dir or next(new_folders(order.name))).resolve()
    if is_taken(path):
        raise RunFolderError(f"{path} is there already: name a new folder for the run")
    if engine == "flower":
        from shoal.deploy.flower_submit import submit as run_app

        run_app(None, folder, connection=server, show=print, bring=path)
        return
    from shoal.deploy.nvflare_submit import submit as run_job

    there = Path(order.run_dir) if Path(order.run_dir).is_absolute() else None
    run = run_job(Path(server), folder, show=print, within=None, run_dir=there)
    if there is not None:
        print(f"the run is in {there} on the server's machine, as the job says")
        return
    with storing(path):
        path.mkdir(parents=True, exist_ok=True)
        path.rmdir()  # or the run's would be put into it
        shutil.move(run, path)
    print(f"the run is in {path}")


def _exported(folder: Path) -> tuple[str, str]:
    """Returns which engine's an exported folder is, and the order in it.

    Raises:
        ConfigurationError: It is no such folder.
    """
    from shoal.deploy.flower_server import ORDER as KEY
    from shoal.deploy.nvflare_job import APP, ORDER

    try:
        if (folder / "pyproject.toml").is_file():
            told = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
            return "flower", str(told["tool"]["flwr"]["app"]["config"][KEY])
        return "nvflare", json.dumps(json.loads((folder / APP / "config" / ORDER).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{folder} holds neither a Flower app nor an NVFlare job of shoal's: write one with `shoal export`"
        ) from error
