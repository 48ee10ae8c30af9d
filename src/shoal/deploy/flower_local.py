"""Flower's processes for a federation on this machine: a SuperLink, and a SuperNode for each site."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.deploy.certificates import ServerCertificates, write_node_key, write_server_certificates
from shoal.deploy.flower_supernode import supernode_command, without_app_code
from shoal.deploy.flower_tools import CONNECTION, HOME, call, environment, toml_string, tool
from shoal.deploy.started import StartedProcesses
from shoal.errors import ConfigurationError, EngineError
from shoal.processes.ports import free_ports
from shoal.runs.files import write_atomic, write_json

ADDRESS = "127.0.0.1"

CERTIFICATES, KEYS, STATE, SITES, FACTS = "certificates", "keys", "state", "sites", "flower.json"
"""What is in a deployment's folder."""

LOOK = 0.25
"""Seconds between two looks for what is awaited."""

ANSWER = 30.0
"""Seconds in which one command of ``flwr`` must answer."""

STOP = 10.0
"""Seconds in which processes that were asked to end must have ended."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

SUPERLINK = "superlink"


def up(
    folder: Path,
    sites: Sequence[str],
    site_commands: Mapping[str, Sequence[str]],
    *,
    within: float,
    app_code: bool = False,
) -> None:
    """Starts a federation of Flower's on this machine, with TLS and a key for each site, and waits until all are there.

    What an earlier deployment in the folder has kept, such as its list of runs, is replaced; its logs stay until they
    are written anew.

    Args:
        folder: Where everything is written.
        sites: Their names.
        site_commands: By site, the command of the site's own process, which gets the parcels.
        within: Seconds.
        app_code: Whether the SuperNodes run the ClientApps of apps, as Flower does, and not shoal's own alone.

    Raises:
        ConfigurationError: The names cannot be, or a deployment runs in this folder.
        EngineError: A process ended, or not all were there in time; none is left.
    """
    until = time.monotonic() + within
    folder = folder.resolve()
    started = StartedProcesses(folder)
    started.check_none_runs()
    _check(folder, sites, site_commands)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    local = _Local(folder, started, until, app_code=app_code)
    try:
        local.start(sites, site_commands)
    except BaseException:
        down(folder, within=STOP)
        raise


def down(folder: Path, *, within: float = STOP) -> None:
    """Ends all processes of a deployment; what they wrote stays.

    Args:
        folder: The deployment's.
        within: Seconds in which each may end by itself, before it is killed.
    """
    StartedProcesses(folder).stop(within=within)


def commands(folder: Path) -> list[str]:
    """Returns what administrators type on machines of their own for what :func:`up` has started in a folder.

    Raises:
        ConfigurationError: Nothing was started there.
    """
    try:
        sites = json.loads((folder / FACTS).read_text(encoding="utf-8"))["sites"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{folder} is no deployment of Flower's: start one with `shoal deploy up`") from error
    server = [
        "# on the server, whose certificate names HOST",
        "export FLWR_TELEMETRY_ENABLED=0",
        "flower-superlink --host 0.0.0.0 --port 8000 --database state/superlink.db --enable-supernode-auth "
        "--disable-runtime-dependency-installation --ssl-ca-certfile certificates/ca.crt "
        "--ssl-certfile certificates/server.pem --ssl-keyfile certificates/server.key",
        "# once for each site, from where ~/.flwr/config.toml names the server",
        *[f"flwr supernode register keys/{site}.pub {CONNECTION}" for site in sites],
    ]
    for site in sites:
        server += [
            f"# at {site}, with ca.crt and its own key",
            f"shoal site sites/{site} &",
            f"shoal supernode sites/{site} --superlink HOST:8000 --root-certificates ca.crt "
            f"--auth-supernode-private-key {site}",
        ]
    return server


class _Local:
    """One start of a deployment.

    Args:
        folder: Where everything is written.
        started: The processes.
        until: When all must be there, on the monotonic clock.
        app_code: Whether the SuperNodes run the ClientApps of apps.
    """

    def __init__(self, folder: Path, started: StartedProcesses, until: float, *, app_code: bool) -> None:
        self._folder, self._started, self._until = folder, started, until
        self._app_code = app_code
        self._env: dict[str, str] = {}

    def start(self, sites: Sequence[str], site_commands: Mapping[str, Sequence[str]]) -> None:
        certificates = self._write(sites)
        port, *ports = free_ports(1 + len(sites))
        self._configure(certificates, port)
        write_json(self._folder / FACTS, {"engine": "flower", "sites": list(sites), "port": port})
        self._start_superlink(certificates, port)
        for site in sites:  # they take longest, and need nobody
            self._started.start(f"site-{site}", site_commands[site], env=self._env, cwd=self._folder)
        self._await("the SuperLink to listen", lambda: _listens(port, certificates))
        for site in sites:
            self._call(["supernode", "register", str(self._folder / KEYS / f"{site}.pub"), CONNECTION])
        for site, own in zip(sites, ports, strict=True):
            self._start_supernode(site, certificates, port, own)
        self._await(f"{len(sites)} SuperNodes to be online", lambda: self._online() >= len(sites))

    def _write(self, sites: Sequence[str]) -> ServerCertificates:
        for part in (CERTIFICATES, KEYS, STATE):
            shutil.rmtree(self._folder / part, ignore_errors=True)
        (self._folder / STATE).mkdir(mode=0o700)
        for site in sites:
            (self._folder / SITES / site).mkdir(mode=0o700, parents=True, exist_ok=True)
            write_node_key(self._folder / KEYS, site)
        return write_server_certificates(self._folder / CERTIFICATES)

    def _configure(self, certificates: ServerCertificates, port: int) -> None:
        home = self._folder / HOME
        home.mkdir(mode=0o700, exist_ok=True)
        lines = [
            "[superlink]",
            f'default = "{CONNECTION}"',
            "",
            f"[superlink.{CONNECTION}]",
            f'address = "{ADDRESS}:{port}"',
            f"root-certificates = {toml_string(str(certificates.authority))}",
        ]
        write_atomic(home / "config.toml", "\n".join(lines) + "\n")
        self._env = environment(home)

    def _start_superlink(self, certificates: ServerCertificates, port: int) -> None:
        command = [
            *[tool("flower-superlink"), "--host", ADDRESS, "--port", str(port)],
            *["--database", str(self._folder / STATE / "superlink.db")],
            *["--enable-supernode-auth", "--disable-runtime-dependency-installation"],
            *["--ssl-ca-certfile", str(certificates.authority)],
            *["--ssl-certfile", str(certificates.certificate), "--ssl-keyfile", str(certificates.key)],
        ]
        self._started.start(SUPERLINK, command, env=self._env, cwd=self._folder)

    def _start_supernode(self, site: str, certificates: ServerCertificates, port: int, own: int) -> None:
        options = [
            *["--superlink", f"{ADDRESS}:{port}", "--port", str(own)],
            *["--root-certificates", str(certificates.authority)],
            *["--auth-supernode-private-key", str(self._folder / KEYS / site)],
        ]
        place = self._folder / SITES / site
        env = self._env if self._app_code else without_app_code(place, self._env)
        self._started.start(f"supernode-{site}", supernode_command(place, options), env=env, cwd=self._folder)

    def _online(self) -> int:
        nodes = self._call(["supernode", "list", CONNECTION])["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def _call(self, arguments: Sequence[str]) -> dict[str, Any]:
        self._check_alive()
        return call(arguments, self._env, within=max(min(ANSWER, self._until - time.monotonic()), 1.0))

    def _await(self, what: str, there: Callable[[], bool]) -> None:
        while not there():
            self._check_alive()
            if time.monotonic() > self._until:
                raise EngineError(f"waited too long for {what}; {self._said(SUPERLINK)}")
            time.sleep(LOOK)

    def _check_alive(self) -> None:
        for name, lives in self._started.alive().items():
            if not lives:
                raise EngineError(f"{name} has ended; {self._said(name)}")

    def _said(self, name: str) -> str:
        return f"the last lines of {self._started.log(name)}:\n{self._started.last_lines(name) or '(nothing)'}"


def _listens(port: int, certificates: ServerCertificates) -> bool:
    context = ssl.create_default_context(cafile=str(certificates.authority))
    try:
        with socket.create_connection((ADDRESS, port), 5) as plain, context.wrap_socket(plain, server_hostname=ADDRESS):
            return True
    except OSError:
        return False


def _check(folder: Path, sites: Sequence[str], site_commands: Mapping[str, Sequence[str]]) -> None:
    if not sites:
        raise ConfigurationError("a federation needs at least one site: name them, such as --site a --site b")
    if len(set(sites)) != len(sites):
        raise ConfigurationError("two sites have the same name: each needs its own")
    for site in sites:
        if not NAME.fullmatch(site):
            raise ConfigurationError(f"{site!r} cannot be the name of a site: use letters, digits, '.', '_' and '-'")
        if site not in site_commands:
            raise ConfigurationError(f"there is no command for the process of site {site!r}")
        supernode_command(folder / SITES / site, [])
