"""NVFlare's own FedAvg, which notes how long its rounds take, and an executor that sends back what it was sent."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg


class TimedFedAvg(FedAvg):  # type: ignore[misc]  # NVFlare has no types
    """FedAvg that writes a line for each round, and no model.

    Args:
        order: The name of the file, beside the job's configuration, with what is to be run.
        within: Seconds in which a client must answer; FedAvg has no limit.
    """

    def __init__(self, order: str, within: float) -> None:  # noqa: ARG002 - a job's controller is given both
        super().__init__(task_name="shoal", persistor_id="")
        self._order = order
        self._told: dict[str, Any] = {}
        self._began = 0.0

    def run(self) -> None:
        """Runs the rounds that the order asks for."""
        workspace, job = self.fl_ctx.get_workspace(), self.fl_ctx.get_job_id()
        told = self._told = json.loads((Path(workspace.get_app_config_dir(job)) / self._order).read_text())
        self.num_clients, self.num_rounds = told["sites"], told["rounds"]
        self.model = {f"part_{index}": np.zeros(size, np.float32) for index, size in enumerate(told["sizes"])}
        super().run()

    def sample_clients(self, num_clients: int | None = None) -> Any:
        """Begins a round."""
        self._began = time.perf_counter()
        return super().sample_clients(num_clients)

    def save_model(self, model: Any) -> None:  # noqa: ARG002 - what it would write is not measured
        """Ends a round."""
        moved = self._told["sites"] * 4 * sum(self._told["sizes"])
        told = {"round": self.current_round + 1, "seconds": time.perf_counter() - self._began, "site_seconds": {}}
        with Path(self._told["records"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**told, "bytes_down": moved, "bytes_up": moved}) + "\n")


class Echo(Executor):  # type: ignore[misc]
    """Sends back the arrays that it was sent."""

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:  # noqa: ARG002
        """Returns the arrays, and a number of steps."""
        params = FLModelUtils.from_shareable(shareable).params
        return FLModelUtils.to_shareable(FLModel(params=params, meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: 1}))
