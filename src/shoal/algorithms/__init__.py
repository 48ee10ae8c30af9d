"""Federated methods, one published method a file."""

from shoal.algorithms.aggregation import Aggregate, WeightedSum
from shoal.algorithms.base import Algorithm, ServerState
from shoal.algorithms.fedadagrad import FedAdagrad
from shoal.algorithms.fedadam import FedAdam
from shoal.algorithms.fedavg import FedAvg
from shoal.algorithms.fedavgm import FedAvgM
from shoal.algorithms.fedprox import FedProx
from shoal.algorithms.fedyogi import FedYogi

__all__ = [
    "ALGORITHMS",
    "Aggregate",
    "Algorithm",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "ServerState",
    "WeightedSum",
]

ALGORITHMS: dict[str, type[FedAvg]] = {
    method.__name__.lower(): method for method in (FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi)
}
"""The methods by the names that the command line knows."""
