"""NVFlare's own provisioning of a server and its clients on one machine: certificates, startup kits, policies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.deploy.nvflare_job import CLASSES, NAME
from shoal.errors import ConfigurationError, EngineError
from shoal.runs.files import write_atomic, write_json

PROJECT = "shoal"
SERVER = "localhost"
"""The server's name, by which clients call it and which its certificate has."""

ADMIN = "admin@shoal.local"
"""Who submits jobs."""

ORGANISATION = "shoal"

PROVISIONING = 120.0
"""Seconds that it may take."""

SILENCE = 60
"""Seconds without a sign of life after which the server takes a client for gone; one comes every ten."""

LOOPBACK = "localhost,127.0.0.1,::1"


def kits(folder: Path) -> Path:
    """Returns where the startup kits of a deployment are, one folder for each participant.

    NVFlare makes new ones at each start, and counts them.
    """
    made = (folder / PROJECT).glob("prod_*")
    return max(made, key=lambda path: int(path.name.removeprefix("prod_")), default=folder / PROJECT / "prod_00")


def site_folder(folder: Path, site: str) -> Path:
    """Returns where ``shoal site`` runs for a site of a deployment."""
    return folder / "sites" / site


def environment() -> dict[str, str]:
    """Returns the environment of NVFlare's processes: loopback goes around proxies, and memory is given back."""
    found = dict(os.environ)
    found.setdefault("MALLOC_ARENA_MAX", "4")
    for name in ("no_proxy", "NO_PROXY"):
        found[name] = ",".join(filter(None, [found.get(name), LOOPBACK]))
    return found


def project(sites: Sequence[str], port: int) -> dict[str, Any]:
    """Returns what NVFlare's provisioning reads.

    Args:
        sites: The clients.
        port: Of the server.
    """
    lighter = "nvflare.lighter.impl"
    clients = [{"name": site, "type": "client", "org": ORGANISATION} for site in sites]
    server = {"name": SERVER, "type": "server", "org": ORGANISATION, "fed_learn_port": port, "admin_port": port}
    admin = {"name": ADMIN, "type": "admin", "org": ORGANISATION, "role": "project_admin"}
    return {
        "api_version": 3,
        "name": PROJECT,
        "description": "A federation of shoal",
        "participants": [server, *clients, admin],
        "builders": [
            {"path": f"{lighter}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
            {"path": f"{lighter}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": f"{lighter}.cert.CertBuilder"},
            {"path": f"{lighter}.signature.SignatureBuilder"},
        ],
    }


def provision(folder: Path, sites: Sequence[str], port: int) -> None:
    """Has NVFlare make certificates and startup kits, and adapts the kits to this machine.

    Args:
        folder: The deployment's.
        sites: The clients.
        port: Of the server.

    Raises:
        ConfigurationError: A name cannot be a client's.
        EngineError: The provisioning failed; with what it said.
    """
    for site in sites:
        if not NAME.fullmatch(site) or site in (SERVER, "server"):
            raise ConfigurationError(f"{site!r} cannot be the name of a site in NVFlare: use letters, digits and -")
    write_json(folder / "project.yml", project(sites, port))  # which JSON is, too
    command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", "project.yml", "-w", str(folder), "--force"]
    # NVFlare's command keeps notes in the home folder of who calls it: those of a deployment stay in its own.
    surroundings = environment() | {"HOME": str(folder)}
    try:
        done = subprocess.run(
            command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=PROVISIONING, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"NVFlare's provisioning has not ended after {PROVISIONING:g} s") from error
    if done.returncode or not (kits(folder) / SERVER).is_dir():
        raise EngineError(f"NVFlare's provisioning failed:\n{_tail(done.stdout + done.stderr)}")
    _adapt_server(kits(folder) / SERVER, folder / "store")
    for site in sites:
        _adapt_client(kits(folder) / site, site_folder(folder, site))


def _adapt_server(kit: Path, store: Path) -> None:
    """Has a server allow shoal's controller, and keep its jobs in the deployment instead of in the system's /tmp."""
    resources = _resources(kit)
    resources["servers"][0]["heart_beat_timeout"] = SILENCE
    persistor: dict[str, Any] = resources["snapshot_persistor"]
    persistor["args"]["storage"]["args"]["root_dir"] = str(store / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(store / "jobs")
    write_json(kit / "local" / "resources.json", resources)


def _adapt_client(kit: Path, site: Path) -> None:
    """Has a client allow shoal's executor, and tells it where its site runs."""
    from shoal.deploy.nvflare_executor import FOLDER_FILE

    write_json(kit / "local" / "resources.json", _resources(kit))
    write_atomic(kit / "local" / FOLDER_FILE, f"{site}\n")


def _resources(kit: Path) -> dict[str, Any]:
    """Returns a kit's resources as NVFlare has them by default, with shoal's components allowed."""
    resources: dict[str, Any] = json.loads((kit / "local" / "resources.json.default").read_text())
    return allowing(resources)


def allowing(resources: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a participant's resources with shoal's components among those that it allows."""
    allowed = list(resources.get("class_allow_list", ()))
    return {**resources, "class_allow_list": [*allowed, *(name for name in CLASSES if name not in allowed)]}


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-15:])
