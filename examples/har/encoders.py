"""What reads a window of signals: a transformer over patches, a small convolutional network, and a head for either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shoal.errors import ConfigurationError

SAMPLES = 128
"""Samples of a window."""

STILL = 1e-2
"""A deviation, as a share of the usual one, that is as good as none."""

WEIGHT = 3.0
"""What the statistics of a window are multiplied with, lest the head overlooks them among the many other features."""


class PatchEncoder(nn.Module):
    """A transformer over pieces of a window (Dosovitskiy et al. 2021, in one dimension); the mean over its pieces.

    Args:
        channels: Signals of a window.
        patch: Samples of a piece; divides 128.
        dim: Features of a piece.
        depth: Layers.
        heads: Of the attention; divides ``dim``.
        dropout: In each layer.

    Raises:
        ConfigurationError: The sizes do not divide each other.
    """

    def __init__(self, channels: int, *, patch: int, dim: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        if SAMPLES % patch:
            raise ConfigurationError(f"patches of {patch} samples do not divide a window of {SAMPLES}: --vit-patch 8")
        if dim % heads:
            raise ConfigurationError(f"{heads} heads do not divide {dim} features: change --vit-heads or --vit-dim")
        self.features = dim
        """Numbers that describe a window."""
        self.patches = nn.Conv1d(channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, SAMPLES // patch, dim))
        layers = (
            nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dim)

    def forward(self, signals: Tensor) -> Tensor:
        """Returns features [n, dim] of windows [n, channels, 128]."""
        pieces = self.patches(signals).transpose(1, 2) + self.positions
        mean: Tensor = self.norm(self.layers(pieces)).mean(dim=1)
        return mean


class ConvEncoder(nn.Module):
    """Three convolutions, the mean and the largest of what each channel gives over time, and two statistics.

    Each convolution is followed by a normalisation over groups of channels of one window, not over a batch: so what a
    window gives does not depend on the others in its batch, and any number of devices computes the same. It also takes
    away how much a window moves, and people who sit differ from people who stand by little else. So each signal's mean
    and the logarithm of its deviation go around the convolutions.

    Args:
        channels: Signals of a window.
        dropout: Of what the convolutions give.
        width: Channels after the first convolution; twice as many after the others; a multiple of 8.
    """

    def __init__(self, channels: int, *, dropout: float, width: int = 32) -> None:
        super().__init__()
        widths = (channels, width, 2 * width, 2 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv1d(before, after, 5, padding=2), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool1d(2)]
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.features = 2 * widths[-1] + 2 * channels
        """Numbers that describe a window."""

    def forward(self, signals: Tensor) -> Tensor:
        """Returns features [n, features] of windows [n, channels, 128]."""
        found = self.layers(signals)
        deviation, mean = torch.std_mean(signals, dim=2)
        around = torch.cat([mean, torch.log(deviation + STILL)], dim=1)
        return torch.cat(
            [self.dropout(torch.cat([found.mean(dim=2), found.amax(dim=2)], dim=1)), WEIGHT * around], dim=1
        )


class Classifier(nn.Module):
    """An encoder, and a head that names the activity.

    Args:
        encoder: Has ``features``, and returns as many numbers for a window.
        hidden: Sizes of the head's hidden layers.
        dropout: In the head.
        classes: How many activities there are.
        frozen: Whether the encoder stays as it is, and only the head learns.
    """

    def __init__(
        self, encoder: PatchEncoder | ConvEncoder, *, hidden: Sequence[int], dropout: float, classes: int, frozen: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(not frozen)
        self.frozen = frozen
        sizes = (encoder.features, *hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    def forward(self, signals: Tensor) -> Tensor:
        """Returns scores [n, classes] of windows [n, channels, 128]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encoder(signals)
        scores: Tensor = self.head(features)
        return scores

    def train(self, mode: bool = True) -> Classifier:
        """Switches dropout and the like on or off; in a frozen encoder they stay off."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def classifier(
    kind: str,
    *,
    channels: int,
    classes: int,
    hidden: Sequence[int],
    dropout: float,
    frozen: bool,
    weights: Path | None,
    vit: Mapping[str, int],
) -> Classifier:
    """Returns a new classifier.

    Args:
        kind: "vit" or "cnn".
        channels: Signals of a window.
        classes: How many activities there are.
        hidden: Sizes of the head's hidden layers.
        dropout: In the encoder and in the head.
        frozen: Whether the encoder stays as it is.
        weights: A file with the encoder's weights; None for random ones.
        vit: Sizes of :class:`PatchEncoder`.

    Raises:
        ConfigurationError: The sizes do not fit each other, or the weights the encoder.
    """
    encoder = (
        PatchEncoder(channels, dropout=dropout, **vit) if kind == "vit" else ConvEncoder(channels, dropout=dropout)
    )
    if weights is not None:
        load_encoder(encoder, weights)
    return Classifier(encoder, hidden=hidden, dropout=dropout, classes=classes, frozen=frozen)


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Gives an encoder the weights of a file: its own, or those of a classifier's encoder, such as a run's model.

    Raises:
        ConfigurationError: The file cannot be read, or holds another encoder.
    """
    try:
        found: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"--encoder-path {path} is no safetensors file that can be read: {error}") from error
    inner = {name.removeprefix("encoder."): found[name] for name in found if name.startswith("encoder.")}
    found = inner or found
    here = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in found.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ConfigurationError(
                f"--encoder-path {path} holds another encoder: {name} is {there.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here; give the --encoder, --mode and --vit-… that it was made with"
            )
    encoder.load_state_dict(found)
