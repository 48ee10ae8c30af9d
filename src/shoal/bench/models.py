"""The models that are measured, and random data of their shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shoal.data import ArrayDataset

CLASSES = 10
HAR_CLASSES = 6

MOST_SAMPLES = 20_000
"""How many different samples there are; beyond, clients share them, so that a population costs no memory."""


@dataclass(frozen=True)
class BenchModel:
    """A model and its inputs."""

    make: Callable[[], nn.Module]
    """Makes it."""
    shape: tuple[int, ...]
    """The shape of one input."""
    vocabulary: int | None = None
    """Inputs are tokens below this number; None: they are real."""
    classes: int = CLASSES
    """How many outputs it has."""

    def inputs(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Returns random inputs, [count, …], float32 or int64."""
        if self.vocabulary is not None:
            return rng.integers(self.vocabulary, size=(count, *self.shape))
        return rng.standard_normal((count, *self.shape), dtype=np.float32)


class LeNet(nn.Sequential):
    """The CNN of the PyTorch tutorial on CIFAR-10: 62,006 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, CLASSES),
        )


class Residual(nn.Module):
    """Two convolutions with group normalisation, around which the input passes.

    Args:
        channels: Of the input.
        width: Of the output.
        stride: Of the first convolution.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.GroupNorm(2, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(2, width),
        )
        same = stride == 1 and channels == width
        self.past: nn.Module = nn.Identity()
        if not same:
            self.past = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.GroupNorm(2, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns [n, width, …] for [n, channels, …]."""
        return torch.relu(self.body(inputs) + self.past(inputs))


class ResNet18GN(nn.Sequential):
    """ResNet-18 (He et al. 2016) for 32 × 32 images, with group normalisation for BatchNorm (Hsieh et al. 2020)."""

    def __init__(self) -> None:
        stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        blocks = [
            block
            for first, width, stride in stages
            for block in (Residual(first, width, stride), Residual(width, width, 1))
        ]
        super().__init__(
            nn.Conv2d(3, 64, 3, padding=1, bias=False),
            nn.GroupNorm(2, 64),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, CLASSES),
        )


class Transformer(nn.Module):
    """Two encoder layers over 32 tokens, 0.5 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 128)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True) for _ in range(2))
        )
        self.out = nn.Linear(128, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores the mean over the tokens, [n, classes] for [n, tokens]."""
        scores: Tensor = self.out(self.layers(self.embed(tokens)).mean(1))
        return scores


class HarCnn(nn.Sequential):
    """A CNN over 128 moments of 9 channels, as movement sensors give them: 85,446 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(9, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(64, 128, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(128, 64, 5, padding=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(64, HAR_CLASSES),
        )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, CLASSES))


def _mlp10m() -> nn.Module:
    hidden = 2800
    return nn.Sequential(
        nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


MODELS = {
    "logistic": BenchModel(lambda: nn.Linear(60, CLASSES), (60,)),
    "mlp": BenchModel(_mlp, (784,)),
    "mlp10m": BenchModel(_mlp10m, (784,)),
    "har": BenchModel(HarCnn, (9, 128), classes=HAR_CLASSES),
    "lenet": BenchModel(LeNet, (3, 32, 32)),
    "resnet18gn": BenchModel(ResNet18GN, (3, 32, 32)),
    "transformer": BenchModel(Transformer, (32,), vocabulary=1000),
}
"""The models by the names that the command line knows."""


def random_samples(model: BenchModel, count: int) -> ArrayDataset:
    """Returns so many random samples, or as many as are kept apart."""
    rng = np.random.default_rng(0)
    different = min(count, MOST_SAMPLES)
    return ArrayDataset(
        model.inputs(different, rng), rng.integers(model.classes, size=different), classes=model.classes
    )
