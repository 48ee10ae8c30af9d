"""Logistic regression on skewed digits, for ``shoal federate experiment.py``."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import shoal


def experiment(clients: int = 50, alpha: float = 0.1, lr: float = 0.1, seed: int = 0) -> shoal.Experiment:
    train, test = shoal.data.digits(seed=seed)
    return shoal.Experiment(
        name="logistic",
        learner=shoal.TorchLearner(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            loss=F.cross_entropy,
            optimizer=partial(torch.optim.SGD, lr=lr),
            batch_size=10,
            epochs=5,
        ),
        clients=shoal.data.partition(train, shoal.data.Dirichlet(clients=clients, alpha=alpha), seed=seed),
        evaluate=test,
        rounds=30,
        cohort=min(10, clients),
        seed=seed,
    )
