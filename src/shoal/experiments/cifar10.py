"""CIFAR-10: 60,000 colour images of 32 × 32 pixels."""

from __future__ import annotations

from torch import nn

from shoal import data
from shoal.experiments.images import label_skewed


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


experiment = label_skewed("cifar10", CifarNet, data.cifar10, rounds=200)
