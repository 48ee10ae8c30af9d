"""Rounds of real sites on this machine, over Flower or NVFlare, as ``shoal deploy up`` starts them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from shoal.bench.server_memory import ServerMemory
from shoal.bench.site_case import EXPERIMENT, SiteCase, SiteRun
from shoal.deploy.private_site import write_site
from shoal.deploy.site_settings import Allowed
from shoal.deploy.started import StartedProcesses
from shoal.errors import EngineError, MissingExtraError
from shoal.runs import read_metrics

PACKAGES = {"flower": "flwr", "nvflare": "nvflare"}

START = 300.0
"""Seconds in which all must be ready."""

WITHIN = 3600.0
"""Seconds that one case may take."""


class DeployedSites:
    """Starts a server and sites anew for each case: what one has left in the server's memory would help the next.

    Args:
        engine: ``flower`` or ``nvflare``.
        names: The sites'.
        ranks: Processes of each.
        folder: For all that the deployment writes.

    Raises:
        MissingExtraError: The engine is not installed.
    """

    def __init__(self, engine: str, names: Sequence[str], ranks: int, folder: Path) -> None:
        if find_spec(PACKAGES[engine]) is None:
            raise MissingExtraError(PACKAGES[engine], purpose=f"measure sites with {engine}", extra=engine)
        self._engine = engine
        self._names = list(names)
        self._ranks = ranks
        self._folder = folder
        self._local: Any = importlib.import_module(f"shoal.deploy.{engine}_local")
        self._server = self._local.SUPERLINK if engine == "flower" else f"nvflare-{self._local.SERVER}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, case: SiteCase, folder: Path) -> SiteRun:
        """Runs a federation, and returns what was noted of it.

        Raises:
            EngineError: It did not end well.
        """
        folder.mkdir(parents=True)
        allowed = [Allowed(name=EXPERIMENT, source=EXPERIMENT, settings=("*",), devices=self._ranks, accelerator="cpu")]
        commands = {name: write_site(self._folder / "sites" / name, name, allowed) for name in self._names}
        # Flower's own FedAvg has clients of its own.
        more = {"app_code": True} if case.own and self._engine == "flower" else {}
        self._local.up(self._folder, self._names, commands, within=START, **more)
        try:
            return self._run(case, folder)
        finally:
            self._local.down(self._folder, within=20.0)

    def _run(self, case: SiteCase, folder: Path) -> SiteRun:
        with ServerMemory(StartedProcesses(self._folder).pids()[self._server]) as memory:
            if case.own:
                from shoal.bench.engine_fedavg import run_own

                records = run_own(self._engine, self._folder, case, folder, WITHIN)
            else:
                self._submit(case, folder)
                records = read_metrics(folder / "run" / "metrics.jsonl")
        if not records:
            raise EngineError(f"the run of {self._engine} with {case.size_mb:g} MB left no records in {folder}")
        return SiteRun(records=records, memory_bytes=memory.most)

    def _submit(self, case: SiteCase, folder: Path) -> None:
        from shoal.deploy.order import Order

        run_dir = folder / "run"
        order = Order(experiment=EXPERIMENT, name=EXPERIMENT, settings=case.settings(), run_dir=str(run_dir)).to_json()
        said: list[str] = []
        if self._engine == "flower":
            from shoal.deploy.flower_app import write_app
            from shoal.deploy.flower_submit import submit
            from shoal.deploy.flower_tools import CONNECTION

            write_app(folder / "app", order=order, name=EXPERIMENT, files={})
            submit(self._folder, folder / "app", connection=CONNECTION, show=said.append, within=WITHIN)
            return
        from shoal.deploy.nvflare_job import write_job
        from shoal.deploy.nvflare_submit import submit as submit_job

        write_job(folder / "job", order=order, name=EXPERIMENT)
        submit_job(self._folder, folder / "job", show=said.append, within=WITHIN, run_dir=run_dir)
