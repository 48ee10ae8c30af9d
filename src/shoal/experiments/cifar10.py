"""CIFAR-10: 60,000 colour images of 32 × 32 pixels."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from shoal import data
from shoal.experiments.images import image_experiment
from shoal.federation import Experiment


class CifarNet(nn.Sequential):
    """A LeNet of 62,006 parameters: 32 × 32 colour images in, ten scores out."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )


def experiment(
    *,
    clients: int = 100,
    alpha: float = 0.3,
    lr: float = 0.05,
    epochs: int = 1,
    batch_size: int = 32,
    data_dir: str | None = None,
    seed: int = 0,
) -> Experiment:
    """Returns a LeNet on CIFAR-10, the labels skewed over the clients by Dirichlet(alpha).

    Args:
        clients: Size of the population.
        alpha: Concentration of the label skew; small is more skewed.
        lr: The clients' learning rate.
        epochs: Local passes over a client's data.
        batch_size: Examples in a batch.
        data_dir: Where ``cifar-10-python.tar.gz`` lies, or is to be put.
        seed: Decides the partition.
    """
    train, test = data.cifar10(data_dir=Path(data_dir) if data_dir else None)
    return image_experiment(
        "cifar10",
        CifarNet,
        train,
        test,
        clients=clients,
        alpha=alpha,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        rounds=200,
    )
