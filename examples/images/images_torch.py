"""The trainings with torch: the model, and how it is trained."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shoal
from images import SMALLEST, STRENGTH, Images, readers


def as_colours(images: Tensor) -> Tensor:
    """Returns images [n, 1 or 3, height, width] of 8 bits as [n, 3, height, width] in 0 to 1."""
    return shoal.scale_pixels(images).expand(-1, 3, -1, -1)


class Augment(nn.Module):
    """In training, flips half of the images, and changes the brightness and contrast of each."""

    def forward(self, images: Tensor) -> Tensor:
        """Returns images [n, 3, height, width] in 0 to 1."""
        if not self.training:
            return images
        flip, brightness, contrast = torch.rand(3, len(images), 1, 1, 1, device=images.device).unbind()
        images = torch.where(flip < 0.5, images.flip(3), images)
        middle = images.mean((1, 2, 3), keepdim=True)
        stretched = middle + (images - middle) * (1 + STRENGTH * (2 * contrast - 1))
        return (stretched + STRENGTH * (2 * brightness - 1)).clamp(0, 1)


class Block(nn.Module):
    """A residual block that halves height and width. GroupNorm knows no batch, so devices can share one exactly."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images) + self.skip(images))


class ResNet(nn.Sequential):
    """A small residual network, as deep as the images are large; it begins with random weights.

    Args:
        size: The images' height and width.
        classes: How many there are.
        augment: Whether the images are changed in training.
        width: Channels of the first layer; each block doubles them.
    """

    def __init__(self, *, size: int, classes: int, augment: bool, width: int = 16) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.GroupNorm(8, width)]
        while size // 2 >= SMALLEST:
            layers.append(Block(width, 2 * width))
            size, width = size // 2, 2 * width
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        super().__init__(*([Augment()] if augment else []), *layers, *head)


def learner(arguments: argparse.Namespace, data: Images, batch_size: int, *, sharing: int = 1) -> shoal.TorchLearner:
    """Returns what trains on the images.

    Args:
        arguments: As :class:`images.Parser` has them.
        data: The images.
        batch_size: How many a device has in a step.
        sharing: The number of processes that share this machine.
    """
    return shoal.TorchLearner(
        partial(ResNet, size=data.size, classes=data.classes, augment=arguments.augment),
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.Adam, lr=arguments.learning_rate),
        batch_size=batch_size,
        train_metrics=True,
        transform=as_colours,
        workers=readers(sharing) if data.in_files else 0,
    )
