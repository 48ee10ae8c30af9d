"""What both trainings share: their arguments, the images, the model, and what they print."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shoal
from shoal.data import Dataset, Subset
from shoal.devices import Launched
from shoal.errors import ConfigurationError, ShoalError

DOGS = ("Images", "train_list.mat", "test_list.mat")
"""What a folder of Stanford Dogs holds."""

SIZE = 128
"""Height and width of their photographs."""

STRENGTH = 0.2
"""How far brightness and contrast are changed at most."""

SMALLEST = 7
"""The model halves an image until it would be smaller."""


class Parser(argparse.ArgumentParser):
    """The arguments of both scripts; what is wrong with them is said in one line."""

    def __init__(self, description: str | None, *, run_dir: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        add = self.add_argument
        add("datadir", type=Path, nargs="?", help="folder of Stanford Dogs; without them, Fashion-MNIST is used")
        add("-e", "--epochs", type=positive, default=10, help="passes over the images (%(default)s)")
        add("-bs", "--batch-size", type=positive, default=1024, help="images in a step, on all devices (%(default)s)")
        add("-lr", "--learning-rate", type=rate, default=0.001, help="of Adam (%(default)s)")
        add("--accelerator", choices=("auto", "cpu", "cuda"), default="auto")
        add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
        add("--augment", action=argparse.BooleanOptionalAction, default=True, help="flips, brightness, contrast")
        add("--subset", type=positive, metavar="N", help="only N images to train on, and N to test with: for a trial")
        add("--seed", type=natural, default=0, help="decides all randomness (%(default)s)")
        add("--run-dir", type=Path, default=Path(run_dir), help="where all results go (%(default)s)")
        add("--resume", action="store_true", help="go on with the training in --run-dir")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def natural(text: str, least: int = 0) -> int:
    """Returns a whole number of an argument."""
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is not at least {least}")
    return value


def positive(text: str) -> int:
    """Returns a whole number of an argument, at least 1."""
    return natural(text, least=1)


def rate(text: str) -> float:
    """Returns the learning rate of an argument."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


@contextmanager
def told_in_one_line(place: Launched | None = None) -> Iterator[None]:
    """Ends the script with one line and a code where shoal refuses something, or something fails.

    Args:
        place: Which of several processes this is.
    """
    who = Path(sys.argv[0]).name + (f": rank {place.rank}" if place else "")
    try:
        yield
    except ShoalError as error:
        sys.stdout.flush()  # in a file or a pipe, what was said before comes before
        print(f"{who}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)
    except KeyboardInterrupt as interrupt:
        print(f"{who}: {str(interrupt) or 'stopped before the first step'}", file=sys.stderr)
        sys.exit(130)


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


@dataclass(frozen=True, kw_only=True)
class Images:
    """What to train on."""

    told: str
    """Says in a line what it is."""
    train: Dataset
    test: Dataset
    classes: int
    size: int
    """Height and width."""
    in_files: bool
    """Whether each image is decoded from its file when it is needed, or all are in memory."""


def load(folder: Path | None) -> Images:
    """Returns Stanford Dogs where the folder holds them, else Fashion-MNIST.

    Raises:
        ConfigurationError: There is no such folder.
        DataError: Some file is missing or damaged.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(f"there is no folder {folder}: leave it out to train on Fashion-MNIST")
    if folder is not None and any((folder / name).exists() for name in DOGS):
        train, test = shoal.data.stanford_dogs(data_dir=folder, size=SIZE)
        return Images(told=f"Stanford Dogs in {folder}", train=train, test=test, classes=120, size=SIZE, in_files=True)
    own = folder if folder is not None and any(folder.glob("t*-ubyte*")) else None
    clothes = shoal.data.fashion_mnist(data_dir=own)
    missed = "no datadir" if folder is None else f"no Stanford Dogs in {folder}"
    told = f"{missed}: training on Fashion-MNIST"
    return Images(told=told, train=clothes[0], test=clothes[1], classes=10, size=28, in_files=False)


def drawn(data: Dataset, count: int | None, seed: int) -> Dataset:
    """Returns at most so many of the images."""
    if count is None or count >= len(data):
        return data
    return Subset(data, np.random.default_rng(seed).permutation(len(data))[:count])


def per_device(batch: int, devices: int) -> int:
    """Returns each device's part of the overall batch.

    Raises:
        ConfigurationError: It cannot be divided among them.
    """
    if batch < devices:
        raise ConfigurationError(
            f"-bs {batch} is the batch of all {devices} devices together: use -bs {devices} or more, or fewer devices"
        )
    if rest := batch % devices:
        near = f"-bs {batch - rest} or -bs {batch - rest + devices}"
        raise ConfigurationError(f"-bs {batch} cannot be divided among {devices} devices: use {near}")
    return batch // devices


def train(arguments: argparse.Namespace, devices: shoal.Devices, count: int, place: Launched | None = None) -> None:
    """Trains, and measures on all test images after each epoch.

    Args:
        arguments: As :class:`Parser` has them.
        devices: Where to train.
        count: How many there are.
        place: Which of several processes this is.
    """
    started = time.perf_counter()
    batch_size = per_device(arguments.batch_size, count)
    images = load(arguments.datadir)
    leads = place is None or place.rank == 0
    if leads:
        print(images.told, flush=True)
    learner = shoal.TorchLearner(
        partial(ResNet, size=images.size, classes=images.classes, augment=arguments.augment),
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.Adam, lr=arguments.learning_rate),
        batch_size=batch_size,
        train_metrics=True,
        transform=as_colours,
        workers=readers(place) if images.in_files else 0,
    )
    shoal.train(
        learner,
        drawn(images.train, arguments.subset, arguments.seed),
        epochs=arguments.epochs,
        devices=devices,
        evaluate=drawn(images.test, arguments.subset, arguments.seed),
        seed=arguments.seed,
        name="images",
        run_dir=arguments.run_dir,
        resume=arguments.resume,
        callbacks=[shoal.TrainingProgress()],
    )
    if leads:
        print(f"finished after {time.perf_counter() - started:.1f} s")


def readers(place: Launched | None) -> int:
    """Returns how many processes decode photographs for this one: its share of the cores, at most 8."""
    sharing = place.local_count if place else 1
    return min(max(len(os.sched_getaffinity(0)) // sharing, 1), 8)
