"""The work in Flower, simulated by Ray with one actor for each core."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from flower_app import app
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import Work, build, parse, report


class Timed(FedAvg):
    """FedAvg that notes when each round ended, and refuses a round that lacks clients."""

    def __init__(self, work: Work) -> None:
        # The server starts while clients are still joining: without the minima round 1 gets a fraction of those few.
        super().__init__(
            fraction_train=work.cohort / work.population,
            fraction_evaluate=0.0,
            min_train_nodes=work.cohort,
            min_available_nodes=work.population,
        )
        self.cohort = work.cohort
        self.ticks: list[float] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Averages, then notes the time."""
        received = list(replies)
        trained = sum(not reply.has_error() for reply in received)
        if trained != self.cohort:
            raise RuntimeError(f"round {server_round}: {trained} clients of {self.cohort} trained")
        result = super().aggregate_train(server_round, received)
        self.ticks.append(time.perf_counter())
        return result


def server(work: Work, strategy: Timed) -> ServerApp:
    """Makes the server, which tells the clients the work with each message."""
    application = ServerApp()
    config = ConfigRecord(
        {"model": work.model, "population": work.population, "samples": work.samples, "batch-size": work.batch_size}
    )

    @application.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(build(work.model).state_dict()),
            num_rounds=work.warmup + work.rounds,
            train_config=config,
        )

    return application


def main() -> None:
    """Runs the work; Flower's log goes to standard error."""
    work = parse()
    strategy = Timed(work)
    sys.path.insert(0, str(Path(__file__).parent))  # the actors look for flower_app there too
    os.environ["OMP_NUM_THREADS"] = "1"
    run_simulation(
        server_app=server(work, strategy),
        client_app=app,
        num_supernodes=work.population,
        backend_config={
            "init_args": {"num_cpus": work.cores},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    report("flower", work, strategy.ticks, ("flwr", "ray", "torch", "numpy"))


if __name__ == "__main__":
    main()
