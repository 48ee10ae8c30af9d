"""The work in pfl-research; started by torchrun it is shared by several processes."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from work import LEARNING_RATE, Work, build, data, parse, report

THREADED = ("lenet",)  # the models that more threads make faster in one process; the others become slower


class Trained(nn.Module):
    """A network with the two methods that pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.criterion = nn.CrossEntropyLoss()

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss of a batch."""
        loss: Tensor = self.criterion(self.network(inputs), labels)
        return loss

    @torch.no_grad()
    def metrics(self, inputs: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """Measures a batch; pfl evaluates in round 0, which is a warm-up round, and never again."""
        return {"loss": Weighted(float(self.loss(inputs, labels)) * len(labels), len(labels))}


class Clock(TrainingProcessCallback):
    """Notes when each round ended."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Notes the time; the training goes on."""
        del aggregate_metrics, model, central_iteration
        self.ticks.append(time.perf_counter())
        return False, Metrics()


def clients(work: Work) -> FederatedDataset:
    """Makes the data of all clients, as tensors, so that pfl converts nothing while it trains."""
    inputs, labels = data(work.model, work.population, work.samples)
    users = [Dataset([inputs[user], labels[user]], user_id=str(user)) for user in range(work.population)]
    return FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(range(work.population))))


def train(work: Work) -> list[float]:
    """Runs the rounds and returns the time at the end of each."""
    model = Trained(build(work.model))
    wrapped = PyTorchModel(
        model, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(model.parameters(), lr=1.0)
    )
    dataset, clock, rounds = clients(work), Clock(), work.warmup + work.rounds
    settings: dict[str, Any] = {"central_num_iterations": rounds, "evaluation_frequency": rounds + 1}
    FederatedAveraging().run(
        NNAlgorithmParams(**settings, train_cohort_size=work.cohort, val_cohort_size=None),
        SimulatedBackend(training_data=dataset, val_data=dataset, postprocessors=[WeightByDatapoints()]),
        wrapped,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=work.batch_size),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    return clock.ticks


def main() -> None:
    """Runs the work; only the first process answers."""
    work = parse()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    torch.set_num_threads(work.cores if alone and work.model in THREADED else 1)
    np.random.seed(0)  # pfl draws its seeds from the global generator
    ticks = train(work)
    if os.environ.get("RANK", "0") == "0":
        report("pfl" if alone else "pfl-2", work, ticks, ("pfl", "torch", "numpy"))
    if not alone:
        # Otherwise some exits are aborts, "terminate called without an active exception": pfl never closes the process
        # group, and with it closed here it still happened. The answer is printed; nothing is left to tear down.
        os._exit(0)


if __name__ == "__main__":
    main()
