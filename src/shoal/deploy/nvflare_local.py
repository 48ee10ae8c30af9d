"""A server of NVFlare and its clients on one machine, as they are on many: with certificates, in own processes.

They are started without NVFlare's scripts, which leave processes behind that nobody ends.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shoal.deploy.nvflare_project import (
    ADMIN,
    ORGANISATION,
    SERVER,
    environment,
    kits,
    provision,
    site_folder,
)
from shoal.deploy.nvflare_session import Session
from shoal.deploy.started import StartedProcesses
from shoal.errors import EngineError
from shoal.processes.ports import free_ports

APPS = "nvflare.private.fed.app"

GLANCE = 0.5
"""Seconds between two looks at who has registered."""

STOPPING = 20.0
"""Seconds in which processes that were started in vain must end."""


def up(
    folder: Path,
    sites: Sequence[str],
    site_commands: Mapping[str, Sequence[str]],
    *,
    within: float,
) -> None:
    """Provisions and starts a server and its clients, and the sites' own processes, and waits until all are there.

    Args:
        folder: For all that belongs to it: kits, logs, jobs, and the sites' folders, which are
            :func:`shoal.deploy.nvflare_project.site_folder`.
        sites: Their names.
        site_commands: What starts ``shoal site`` for each of them.
        within: Seconds in which all must have registered.

    Raises:
        ConfigurationError: A deployment runs in this folder.
        EngineError: Something could not be started; nothing is left of it but the logs.
    """
    folder = folder.absolute()
    started = StartedProcesses(folder)
    started.check_none_runs()
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + within
    [port] = free_ports(1)
    provision(folder, sites, port)
    try:
        for site, command in site_commands.items():
            site_folder(folder, site).mkdir(parents=True, exist_ok=True)
            started.start(f"site-{site}", command, env=environment(), cwd=site_folder(folder, site))
        for name, command in participants(folder, sites).items():
            started.start(name, command, env=environment(), cwd=kits(folder) / (name.removeprefix("nvflare-")))
        _wait(lambda: _listens(port), started, until, "NVFlare's server does not listen")
        with contextlib.closing(Session(kits(folder) / ADMIN, ADMIN)) as opened:
            _wait(
                *(lambda: _registered(opened, sites), started, until),
                "not all clients have registered with NVFlare's server",
            )
    except BaseException:
        started.stop(within=STOPPING)
        raise


def down(folder: Path, *, within: float) -> None:
    """Ends all processes of a deployment.

    Args:
        folder: Its folder.
        within: Seconds that each has to end by itself.
    """
    StartedProcesses(folder).stop(within=within)


def participants(folder: Path, sites: Sequence[str]) -> dict[str, list[str]]:
    """Returns what starts the server and the clients of a deployment, by the names of their processes."""
    common = ["secure_train=true", f"org={ORGANISATION}", "config_folder=config"]
    python = [sys.executable, "-u", "-m"]
    kit = kits(folder) / SERVER
    found = {f"nvflare-{SERVER}": [*python, f"{APPS}.server.server_train", "-m", str(kit), "-s", "fed_server.json"]}
    found[f"nvflare-{SERVER}"] += ["--set", *common]
    for site in sites:
        found[f"nvflare-{site}"] = [
            *(*python, f"{APPS}.client.client_train", "-m", str(kits(folder) / site), "-s", "fed_client.json"),
            *("--set", f"uid={site}", *common),
        ]
    return found


def commands(folder: Path, sites: Sequence[str] = ()) -> list[str]:
    """Returns what administrators would type on machines of their own for the same as :func:`up`.

    Args:
        folder: The deployment's.
        sites: The sites to tell of; none for all of its kits.
    """
    kit = kits(folder)
    names = sites or sorted(path.name for path in kit.iterdir() if path.name not in (SERVER, ADMIN))
    told = [
        "# Where the project is run: the server's name in project.yml must be one that all sites can resolve.",
        f"nvflare provision -p {shlex.quote(str(folder / 'project.yml'))} -w {shlex.quote(str(folder))}",
        f"# On the server, with the kit {kit / SERVER}:",
        "./startup/start.sh",
    ]
    for name in names:
        told += [
            f"# At {name}, with the kit {kit / name}: list shoal.nvflare.ShoalExecutor in the class_allow_list of",
            "# local/resources.json (a copy of resources.json.default), and start the site's own process:",
            "echo /path/to/site > local/shoal_site",
            "shoal site /path/to/site &",
            "./startup/start.sh",
        ]
    return [*told, f"# Who submits jobs, with the kit {kit / ADMIN}:", "nvflare job submit -j JOB"]


def _wait(ready: Callable[[], bool], started: StartedProcesses, until: float, problem: str) -> None:
    """Waits until something is so.

    Raises:
        EngineError: It takes too long, or a process has ended; with the last lines of the logs.
    """
    while not ready():
        gone = [name for name, alive in started.alive().items() if not alive]
        if gone:
            raise EngineError(f"{', '.join(gone)} has ended:\n{_last_lines(started, gone)}")
        if time.monotonic() > until:
            raise EngineError(f"{problem} in time:\n{_last_lines(started, list(started.alive()))}")
        time.sleep(GLANCE)


def _last_lines(started: StartedProcesses, names: Sequence[str]) -> str:
    return "\n".join(f"{started.log(name)}:\n{started.last_lines(name, 8)}" for name in names)


def _registered(opened: Session, sites: Sequence[str]) -> bool:
    try:
        return set(sites) <= set(opened.call("clients"))
    except EngineError:  # it may not be ready to say
        return False


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
