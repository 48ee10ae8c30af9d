"""The work in Flower's older simulation, which 1.41 still ships and calls deprecated."""

from __future__ import annotations

import time
from typing import Any

from flower_app import client_fn
from flwr.common import FitRes, Parameters, Scalar, ndarrays_to_parameters
from flwr.server import ServerConfig
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from flwr.simulation import start_simulation
from work import Work, build, parse, report


class Timed(FedAvg):
    """FedAvg that notes when each round ended, and refuses a round that lacks clients."""

    def __init__(self, work: Work) -> None:
        config: dict[str, Scalar] = {
            "model": work.model,
            "population": work.population,
            "samples": work.samples,
            "batch-size": work.batch_size,
        }
        super().__init__(
            fraction_fit=work.cohort / work.population,
            fraction_evaluate=0.0,
            min_fit_clients=work.cohort,
            min_available_clients=work.population,
            on_fit_config_fn=lambda _: config,
            initial_parameters=ndarrays_to_parameters(
                [value.numpy() for value in build(work.model).state_dict().values()]
            ),
        )
        self.cohort = work.cohort
        self.ticks: list[float] = []

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: list[Any]
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Averages, then notes the time."""
        if len(results) != self.cohort:
            raise RuntimeError(f"round {server_round}: {len(results)} clients of {self.cohort} trained: {failures[:1]}")
        result = super().aggregate_fit(server_round, results, failures)
        self.ticks.append(time.perf_counter())
        return result


def main() -> None:
    """Runs the work; Flower's log goes to standard error."""
    work = parse()
    strategy = Timed(work)
    start_simulation(
        client_fn=client_fn,
        num_clients=work.population,
        config=ServerConfig(num_rounds=work.warmup + work.rounds),
        strategy=strategy,
        client_resources={"num_cpus": 1, "num_gpus": 0.0},
        ray_init_args={"num_cpus": work.cores, "include_dashboard": False},
    )
    report("flower-legacy", work, strategy.ticks, ("flwr", "ray", "torch", "numpy"))


if __name__ == "__main__":
    main()
