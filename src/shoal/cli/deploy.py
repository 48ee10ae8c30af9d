"""``shoal deploy``: a federation of real sites on this machine, to try it all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import typer

from shoal.cli.exits import guarded
from shoal.errors import ConfigurationError

deploy = typer.Typer(
    name="deploy", help="Try real sites on this machine, with Flower or NVFlare.", no_args_is_help=True
)

DEPLOYMENTS = Path(".shoal")
"""Where deployments are that are given no folder, by their engine."""

Folder = Annotated[Path | None, typer.Option("--folder", help="The deployment's folder; .shoal/ENGINE if left out.")]


class Local(Protocol):
    """What each engine offers for a deployment on this machine."""

    def up(self, folder: Path, sites: Any, site_commands: Any, *, within: float) -> None: ...  # noqa: D102
    def down(self, folder: Path, *, within: float) -> Any: ...  # noqa: D102
    def commands(self, folder: Path) -> list[str]: ...  # noqa: D102


def up(
    engine: Annotated[str, typer.Option(help="flower or nvflare.")],
    sites: Annotated[int, typer.Option(min=1, max=64, help="How many sites.")] = 2,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="A Python file or an exported job that the sites may run, beside the built-in experiments."),
    ] = None,
    folder: Folder = None,
    within: Annotated[float, typer.Option(help="Seconds in which all must be ready.")] = 180.0,
) -> None:
    """Start a server and sites, with certificates and keys of their own, and wait until they are ready."""
    from shoal.deploy.private_site import write_site
    from shoal.deploy.started import StartedProcesses

    local = local_of(engine)
    place = (folder or DEPLOYMENTS / engine).resolve()
    StartedProcesses(place).check_none_runs()  # before the settings of its sites are written anew
    names = [f"site-{number}" for number in range(1, sites + 1)]
    allowed = _allowed(allow or [])
    commands = {name: write_site(place / "sites" / name, name, allowed) for name in names}
    local.up(place, names, commands, within=within)
    print(f"{engine} and {sites} sites are ready in {place}; they may run {', '.join(one.name for one in allowed)}")
    print(f"  shoal federate digits --clients {sites} --engine {engine}")
    print("  shoal deploy down")
    print("\nOn machines of their own, administrators would type:")
    for line in local.commands(place):
        print(f"  {line}")


def status(folder: Folder = None) -> None:
    """Say which processes of the deployments here run."""
    from shoal.deploy.started import StartedProcesses

    found = [(place, StartedProcesses(place)) for place in _deployments(folder)]
    if not found:
        print("nothing is deployed here")
    for place, started in found:
        print(f"{place}:")
        pids = started.pids()
        for name, lives in started.alive().items():
            print(f"  {name:<24} {'runs' if lives else 'has ended'} (process {pids[name]}, {started.log(name)})")
    if any(not lives for _, started in found for lives in started.alive().values()):
        raise typer.Exit(1)


def down(folder: Folder = None) -> None:
    """End the deployments here, and all of their processes."""
    places = _deployments(folder)
    if not places:
        print("nothing is deployed here")
    for place in places:
        engine = engine_of(place)
        local_of(engine).down(place, within=20.0)
        print(f"{engine} in {place} has ended; its logs are still there")


for command in (up, status, down):
    deploy.command()(guarded(command))


def deployment(engine: str, folder: Path | None) -> Path:
    """Returns the folder of a deployment that runs.

    Raises:
        ConfigurationError: There is none.
    """
    from shoal.deploy.started import StartedProcesses

    place = (folder or DEPLOYMENTS / engine).resolve()
    alive = StartedProcesses(place).alive() if place.is_dir() else {}
    if not alive:
        raise ConfigurationError(
            f"no deployment of {engine} runs in {place}: start one with `shoal deploy up --engine {engine} --sites 2`"
        )
    if ended := [name for name, lives in alive.items() if not lives]:
        raise ConfigurationError(
            f"{', '.join(ended)} of {place} has ended: see `shoal deploy status`, and start anew with "
            f"`shoal deploy down` and `shoal deploy up --engine {engine}`"
        )
    return place


def engine_of(place: Path) -> str:
    """Returns which engine a deployment has."""
    return "flower" if (place / "flower.json").exists() else "nvflare"


def local_of(engine: str) -> Local:
    """Returns what an engine offers for a deployment on this machine.

    Raises:
        ConfigurationError: There is no such engine.
        MissingExtraError: It is not installed.
    """
    from importlib import import_module
    from importlib.util import find_spec

    from shoal.errors import MissingExtraError, unknown_name

    packages = {"flower": "flwr", "nvflare": "nvflare"}
    if engine not in packages:
        raise unknown_name("engine of a deployment", engine, packages)
    if find_spec(packages[engine]) is None:
        raise MissingExtraError(packages[engine], purpose=f"deploy sites with {engine}", extra=engine)
    return cast("Local", import_module(f"shoal.deploy.{engine}_local"))


def _deployments(folder: Path | None) -> list[Path]:
    places = [folder] if folder is not None else [DEPLOYMENTS / "flower", DEPLOYMENTS / "nvflare"]
    return [place.resolve() for place in places if (place / "processes.json").exists()]


def _allowed(more: list[str]) -> list[Any]:
    from shoal.deploy.site_settings import Allowed
    from shoal.experiments import BUILT_IN
    from shoal.experiments.sources import absolute, allowed_name, files_of

    for source in more:
        files_of(source)  # refused here, if there is none
    sources = [*BUILT_IN, *more]
    return [Allowed(name=allowed_name(one), source=absolute(one), settings=("*",)) for one in sources]
