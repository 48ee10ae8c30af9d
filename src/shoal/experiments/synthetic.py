"""FedProx's synthetic(α, β): clients whose models and inputs differ by as much as you say."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from shoal import data
from shoal.federation import Experiment
from shoal.learners.torch import TorchLearner


def experiment(
    *,
    clients: int = 30,
    alpha: float = 1.0,
    beta: float = 1.0,
    lr: float = 0.01,
    epochs: int = 20,
    batch_size: int = 10,
    seed: int = 0,
) -> Experiment:
    """Returns logistic regression on synthetic(α, β), in the setting of Li et al. (2020), section 5.1.

    Args:
        clients: Size of the population.
        alpha: How much the clients' true models differ.
        beta: How much the clients' inputs differ.
        lr: The clients' learning rate.
        epochs: Local passes over a client's data.
        batch_size: Examples in a batch.
        seed: Decides the data.
    """
    population, test = data.synthetic(alpha, beta, clients=clients, seed=seed)
    return Experiment(
        name="synthetic",
        learner=TorchLearner(
            partial(nn.Linear, 60, 10),
            loss=F.cross_entropy,
            optimizer=partial(torch.optim.SGD, lr=lr),
            batch_size=batch_size,
            epochs=epochs,
        ),
        clients=population,
        evaluate=test,
        rounds=200,
        cohort=min(10, clients),
        seed=seed,
    )
