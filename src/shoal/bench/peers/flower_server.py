"""A ServerApp with Flower's own FedAvg, which notes how long its rounds take."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class TimedFedAvg(FedAvg):  # type: ignore[misc]  # flwr is not there to be checked against
    """FedAvg that writes a line for each round.

    Args:
        file: For the lines.
        sites: How many take part.
        size: Bytes of the model.
    """

    def __init__(self, file: Path, sites: int, size: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        self._file = file
        self._bytes = sites * size
        self._began = 0.0

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        """Begins a round."""
        self._began = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Ends a round."""
        found = super().aggregate_train(server_round, replies)
        told = {"round": server_round, "seconds": time.perf_counter() - self._began, "site_seconds": {}}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**told, "bytes_down": self._bytes, "bytes_up": self._bytes}) + "\n")
        return found


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds that the run configuration asks for."""
    told = context.run_config
    sizes = json.loads(str(told["sizes"]))
    arrays = ArrayRecord([np.zeros(size, np.float32) for size in sizes])
    strategy = TimedFedAvg(Path(str(told["records"])), int(told["sites"]), 4 * sum(sizes))
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(told["rounds"]))
