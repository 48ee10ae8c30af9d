"""Small networks of every kind, on images of 3 × 8 × 8 or on what they make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.data import ArrayDataset, Population

CLASSES = 4
SHAPE = (3, 8, 8)


def images(sizes: Sequence[int], dtype: Any = np.float32) -> Population:
    """Returns clients with so many random images each."""
    rng = np.random.default_rng(0)
    data = ArrayDataset(rng.normal(size=(sum(sizes), *SHAPE)).astype(dtype), rng.integers(CLASSES, size=sum(sizes)))
    return Population(data, np.arange(len(data)), np.concatenate([[0], np.cumsum(sizes)]))


class Recurrent(nn.Module):
    """Reads the image as eight steps of 24 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(24, 8, batch_first=True)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scores after the last step."""
        states, _ = self.cell(inputs.flatten(1).unflatten(1, (8, 24)))
        return self.out(states[:, -1])


class Transformer(nn.Module):
    """Attends over the eight rows."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 16)
        # The gradient of a key's bias is zero but for rounding, and Adam makes full steps of rounding.
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True, bias=False)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scores of the mean."""
        return self.out(self.layer(self.embed(inputs.flatten(1).unflatten(1, (8, 24)))).mean(1))


def logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), *_head(8 * 9)
    )


def batch_norm() -> nn.Module:
    # Without the bias, whose gradient before a BatchNorm is zero but for rounding: Adam makes full steps of rounding.
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), *_head(6 * 9))


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.MaxPool2d(2), *_head(6 * 9))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(0.3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(216, CLASSES))


def _head(features: int) -> tuple[nn.Module, ...]:
    return nn.Flatten(), nn.Linear(features, CLASSES)


MODELS = {
    "logistic": logistic,
    "mlp": mlp,
    "cnn": cnn,
    "batch_norm": batch_norm,
    "group_norm": group_norm,
    "transformer": Transformer,
    "lstm": Recurrent,
}
