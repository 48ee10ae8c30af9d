"""Fashion-MNIST: 70,000 images of clothes, 28 × 28 pixels."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from shoal import data
from shoal.experiments.images import image_experiment
from shoal.federation import Experiment


class FashionNet(nn.Sequential):
    """The CNN of McMahan et al. (2017) with narrower layers: 28 × 28 grey images in, ten scores out."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
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
    """Returns a CNN on Fashion-MNIST, the labels skewed over the clients by Dirichlet(alpha).

    Args:
        clients: Size of the population.
        alpha: Concentration of the label skew; small is more skewed.
        lr: The clients' learning rate.
        epochs: Local passes over a client's data.
        batch_size: Examples in a batch.
        data_dir: Where the data set's files lie, or are to be put.
        seed: Decides the partition.
    """
    train, test = data.fashion_mnist(data_dir=Path(data_dir) if data_dir else None)
    return image_experiment(
        "fashion_mnist",
        FashionNet,
        train,
        test,
        clients=clients,
        alpha=alpha,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        rounds=50,
    )
