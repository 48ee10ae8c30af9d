"""The folder of a job of NVFlare that runs a federation of shoal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import ConfigurationError
from shoal.runs.files import is_taken, write_json

APP = "app"
"""The folder in the job of what server and clients are given."""

CUSTOM = f"{APP}/custom"
"""The folder in the job of the code that it brings."""

ORDER = "shoal_order.json"
"""The file beside the job's configuration with what the server is to run.

It is not in the configuration itself, because NVFlare reads braces there as variables, and objects as components.
"""

RUN = "shoal_run"
"""The folder of the run in the job's folder on the server, which is downloaded with it."""

MARK = "shoal: "
"""Before what shoal says in a job's log."""

CONTROLLER = "shoal.nvflare.ShoalController"
EXECUTOR = "shoal.nvflare.ShoalExecutor"

CLASSES = (CONTROLLER, EXECUTOR)
"""What a site lists among its ``class_allow_list``, to run jobs that bring no code."""

EVERYWHERE = "@ALL"

CHUNK = 1 << 24
"""Bytes of a large tensor that NVFlare fetches in one call."""

DEAD = 20.0
"""Seconds after which a client is taken for dead of which NVFlare has heard that its part of the job has ended."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What NVFlare takes as the name of a job's folder."""


def write_job(
    folder: Path,
    *,
    order: str,
    name: str,
    sites: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
    min_clients: int = 1,
    own_code: bool = True,
    resources: Mapping[str, Mapping[str, Any]] | None = None,
    within: float = 86400.0,
    interval: float = 0.1,
    controller: str = CONTROLLER,
    executor: str = EXECUTOR,
) -> None:
    """Writes the folder of a job, which NVFlare's simulator, its POC mode and a provisioned server run as it is.

    Args:
        folder: Where; it must not exist, or be empty. Its name is the job's folder name, too.
        order: What the server is to run: the JSON of a ``shoal.experiments.remote.Order``.
        name: The job's.
        sites: The clients that take part; none means all.
        files: What the job brings to server and clients, by its path in the folder ``custom``, which Python imports
            from: files and folders.
        min_clients: With fewer clients NVFlare does not begin the job, and ends it.
        own_code: Whether the job counts as one with code of its own even where ``files`` is empty. Sites whose policy
            permits such jobs to who submits it need not know shoal's components; else they must list
            :data:`CLASSES`.
        resources: What the job needs, by client, as NVFlare's ``resource_spec`` has it.
        within: Seconds in which a client must answer a task.
        interval: Seconds after which clients ask for a task again; that is how long a message waits at the most.
        controller: The class that the server runs.
        executor: The class that clients run.

    Raises:
        ConfigurationError: The folder has something in it, or a name cannot be one.
    """
    _check(folder, name, order, sites, min_clients)
    config = folder / APP / "config"
    config.mkdir(parents=True)
    everybody = ["server", *sites] if sites else [EVERYWHERE]
    meta: dict[str, Any] = {
        "name": name,
        "resource_spec": {client: dict(spec) for client, spec in (resources or {}).items()},
        "deploy_map": {APP: everybody},
        "min_clients": min_clients,
    }
    write_json(config / ORDER, json.loads(order))
    write_json(config / "config_fed_server.json", _server(controller, within, interval))
    write_json(config / "config_fed_client.json", _client(executor, interval))
    _copy(files or {}, folder / CUSTOM, always=own_code)
    write_json(folder / "meta.json", meta)


def _server(controller: str, within: float, interval: float) -> dict[str, Any]:
    return {
        "format_version": 2,
        "server": {"task_request_interval": interval},
        "np_download_chunk_size": CHUNK,
        "dead_client_grace_period": DEAD,
        "dead_client_check_lead_time": DEAD,
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "workflows": [{"id": "shoal", "path": controller, "args": {"order": ORDER, "within": within}}],
    }


def _client(executor: str, interval: float) -> dict[str, Any]:
    return {
        "format_version": 2,
        "default_task_fetch_interval": interval,
        "np_download_chunk_size": CHUNK,
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "executors": [{"tasks": ["shoal"], "executor": {"path": executor, "args": {}}}],
    }


def _copy(files: Mapping[str, Path], custom: Path, *, always: bool) -> None:
    if files or always:
        custom.mkdir()
    for name, source in files.items():
        target = custom / name
        if not target.resolve().is_relative_to(custom.resolve()) or target == custom:
            raise ConfigurationError(f"a job cannot bring {name!r}: give a path inside of its folder custom")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        except OSError as error:
            raise ConfigurationError(f"{source}, which the job is to bring, cannot be read: {error}") from error


def _check(folder: Path, name: str, order: str, sites: Sequence[str], min_clients: int) -> None:
    for what in (name, folder.name, *sites):
        if not NAME.fullmatch(what):
            raise ConfigurationError(
                f"{what!r} cannot be a name in NVFlare: use letters, digits, dots, underscores and hyphens"
            )
    if "server" in sites or len(set(sites)) < len(sites):
        raise ConfigurationError("the names of sites must differ, and none may be 'server', which is NVFlare's own")
    if min_clients < 1 or (sites and min_clients > len(sites)):
        raise ConfigurationError(f"min_clients must be from 1 to the number of sites, not {min_clients}")
    if is_taken(folder):
        raise ConfigurationError(f"{folder} is not empty: choose another folder for the job")
    if type(json.loads(order)) is not dict:
        raise ConfigurationError("the order must be a JSON object")
