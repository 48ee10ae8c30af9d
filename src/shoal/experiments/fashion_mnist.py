"""Fashion-MNIST: 70,000 images of clothes, 28 × 28 pixels."""

from __future__ import annotations

from torch import nn

from shoal import data
from shoal.experiments.images import label_skewed


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


experiment = label_skewed("fashion_mnist", FashionNet, data.fashion_mnist, rounds=50)
