"""scikit-learn's digits: 1,797 images of 8 × 8 pixels, in the package and so on every machine."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from shoal import data
from shoal.devices import Devices
from shoal.federation import Experiment
from shoal.learners.torch import TorchLearner


class DigitsNet(nn.Sequential):
    """Two convolutions and two linear layers: 8 × 8 grey images in, ten scores out."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def experiment(
    *, clients: int = 100, alpha: float = 0.3, lr: float = 0.05, epochs: int = 5, batch_size: int = 10, seed: int = 0
) -> Experiment:
    """Returns the demonstration: a small CNN on digits, the labels skewed over the clients by Dirichlet(alpha).

    Args:
        clients: Size of the population.
        alpha: Concentration of the label skew; small is more skewed.
        lr: The clients' learning rate.
        epochs: Local passes over a client's data.
        batch_size: Examples in a batch.
        seed: Decides the split into training and held-out images, and the partition.
    """
    train, test = data.digits(seed=seed)
    return Experiment(
        name="digits",
        learner=TorchLearner(
            DigitsNet,
            loss=F.cross_entropy,
            optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9),
            batch_size=batch_size,
            epochs=epochs,
            train_metrics=True,
            devices=Devices(threads=1),
        ),
        clients=data.partition(train, data.Dirichlet(clients=clients, alpha=alpha), seed=seed),
        evaluate=test,
        rounds=30,
        cohort=min(20, clients),
        seed=seed,
    )
