"""The engines' own FedAvg over arrays of a model's size, for comparison: their server, their clients, no training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.bench.site_case import SiteCase
from shoal.experiments.payload import LARGEST_PART
from shoal.runs import read_metrics

PEERS = Path(__file__).parent / "peers"
"""The files that run in the engines' processes."""

PROJECT = """[project]
name = "fedavg"
version = "1.0.0"
description = "FedAvg over arrays that are sent back as they are."
license = "LicenseRef-Private"
requires-python = ">=3.11"
dependencies = []

[tool.flwr.app]
publisher = "shoal"

[tool.flwr.app.components]
serverapp = "flower_server:app"
clientapp = "flower_client:app"

[tool.flwr.app.config]
"""


def run_own(engine: str, deployment: Path, case: SiteCase, folder: Path, within: float) -> list[dict[str, Any]]:
    """Runs an engine's own FedAvg, and returns the records of its rounds.

    Args:
        engine: ``flower`` or ``nvflare``.
        deployment: The folder of a deployment that runs.
        case: How many rounds, sites and megabytes.
        folder: For the run's files.
        within: Seconds that it may take.

    Raises:
        EngineError: It did not end well.
    """
    numbers = round(case.size_mb * 1e6 / 4)
    sizes = [LARGEST_PART] * (numbers // LARGEST_PART) + [numbers % LARGEST_PART]
    records = folder / "metrics.jsonl"
    order = {"rounds": case.rounds + 1, "sites": case.sites, "records": str(records), "sizes": [s for s in sizes if s]}
    (_run_flower if engine == "flower" else _run_nvflare)(deployment, order, folder, within)
    return read_metrics(records)


def _run_flower(deployment: Path, order: Mapping[str, Any], folder: Path, within: float) -> None:
    from shoal.deploy.flower_submit import submit
    from shoal.deploy.flower_tools import CONNECTION, toml_string

    app = folder / "app"
    app.mkdir()
    for name in ("flower_client.py", "flower_server.py"):
        shutil.copyfile(PEERS / name, app / name)
    told = {**order, "sizes": json.dumps(order["sizes"])}
    rows = [f"{key} = {toml_string(value) if isinstance(value, str) else value}" for key, value in told.items()]
    (app / "pyproject.toml").write_text(PROJECT + "\n".join(rows) + "\n", encoding="utf-8")
    said: list[str] = []
    submit(deployment, app, connection=CONNECTION, show=said.append, within=within)


def _run_nvflare(deployment: Path, order: Mapping[str, Any], folder: Path, within: float) -> None:
    from shoal.deploy.nvflare_job import write_job
    from shoal.deploy.nvflare_submit import submit

    write_job(
        folder / "job",
        order=json.dumps(order),
        name="fedavg",
        files={"nvflare_fedavg.py": PEERS / "nvflare_fedavg.py"},
        min_clients=1,
        controller="nvflare_fedavg.TimedFedAvg",
        executor="nvflare_fedavg.Echo",
    )
    said: list[str] = []
    submit(deployment, folder / "job", show=said.append, within=within, run_dir=folder)
