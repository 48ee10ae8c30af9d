"""Many clients share Fashion-MNIST; a few of them train in each round."""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import shoal


class Net(nn.Sequential):
    """The CNN of the PyTorch tutorial, for 28 × 28 grey images."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )


def experiment(
    *,
    clients: int = 2,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 0.001,
    data_dir: str | None = None,
    seed: int = 0,
) -> shoal.Experiment:
    """Each client has its own equal part of the images.

    Args:
        clients: How many there are.
        epochs: Local passes over a client's images in a round.
        steps: Local batches in a round, in place of epochs.
        lr: Learning rate.
        data_dir: Where the images lie, if not where Debian puts them.
        seed: Decides the parts and everything else.
    """
    train, test = shoal.data.fashion_mnist(data_dir=Path(data_dir) if data_dir else None)
    return shoal.Experiment(
        name="scaling",
        learner=shoal.TorchLearner(
            Net,
            loss=F.cross_entropy,
            optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9),
            batch_size=32,
            epochs=epochs,
            steps=steps,
            transform=shoal.scale_pixels,
            devices=shoal.Devices(threads=1),  # as fast for so small a model, and others may want the cores
        ),
        clients=shoal.data.partition(train, shoal.data.IID(clients=clients), seed=seed),
        evaluate=test,
        rounds=3,
        seed=seed,
    )
