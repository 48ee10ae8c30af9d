"""What all trainings share, whatever the framework: their arguments, the images, and what they print."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

import shoal
from shoal.data import Dataset, Subset
from shoal.devices import cores_each
from shoal.errors import ConfigurationError, ShoalError

DOGS = ("Images", "train_list.mat", "test_list.mat")
"""What a folder of Stanford Dogs holds."""

SIZE = 128
"""Height and width of their photographs."""

STRENGTH = 0.2
"""How far brightness and contrast are changed at most."""

SMALLEST = 7
"""The small model halves an image until it would be smaller."""


class Parser(argparse.ArgumentParser):
    """The arguments of all scripts; what is wrong with them is said in one line."""

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
def told_in_one_line(which: str | None = None) -> Iterator[None]:
    """Ends the script with one line and a code where shoal refuses something, or something fails.

    Args:
        which: Of several processes this is, such as ``rank 3``.
    """
    who = Path(sys.argv[0]).name + (f": {which}" if which else "")
    try:
        yield
    except ShoalError as error:
        sys.stdout.flush()  # in a file or a pipe, what was said before comes before
        print(f"{who}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)
    except KeyboardInterrupt as interrupt:
        print(f"{who}: {str(interrupt) or 'stopped before the first step'}", file=sys.stderr)
        sys.exit(130)


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
    channels: int
    """3, or 1 for images without colours."""
    in_files: bool
    """Whether each image is decoded from its file when it is needed, or all are in memory."""


class InThreads:
    """Photographs that several threads read at a time, and are else as they are in the files.

    Args:
        files: Reads them.
        threads: How many.
    """

    def __init__(self, files: Dataset, threads: int) -> None:
        self._files = files
        self._threads = ThreadPoolExecutor(threads)
        self._count = threads
        self.classes = files.classes
        self.targets, self.known_targets = files.targets, files.known_targets
        self.check, self.describe = files.check, files.describe

    def __len__(self) -> int:
        return len(self._files)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads the images; uint8 [n, 3, size, size] and int64 [n]."""
        parts = np.array_split(indices, min(self._count, max(len(indices), 1)))
        inputs, targets = zip(*self._threads.map(self._files.take, parts), strict=True)
        return np.concatenate(inputs), np.concatenate(targets)


def load(folder: Path | None, threads: int = 1) -> Images:
    """Returns Stanford Dogs where the folder holds them, else Fashion-MNIST.

    Args:
        folder: The folder, if there is one.
        threads: How many read photographs at a time; 1 where processes are forked for that.

    Raises:
        ConfigurationError: There is no such folder.
        DataError: Some file is missing or damaged.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(f"there is no folder {folder}: leave it out to train on Fashion-MNIST")
    if folder is not None and any((folder / name).exists() for name in DOGS):
        train, test = (
            InThreads(files, threads) if threads > 1 else files
            for files in shoal.data.stanford_dogs(data_dir=folder, size=SIZE)
        )
        told = f"Stanford Dogs in {folder}"
        return Images(told=told, train=train, test=test, classes=120, size=SIZE, channels=3, in_files=True)
    own = folder if folder is not None and any(folder.glob("t*-ubyte*")) else None
    clothes = shoal.data.fashion_mnist(data_dir=own)
    missed = "no datadir" if folder is None else f"no Stanford Dogs in {folder}"
    told = f"{missed}: training on Fashion-MNIST"
    return Images(told=told, train=clothes[0], test=clothes[1], classes=10, size=28, channels=1, in_files=False)


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


def train(
    arguments: argparse.Namespace,
    devices: shoal.Devices,
    count: int,
    make_learner: Callable[[Images, int], shoal.TorchLearner | shoal.KerasLearner],
    *,
    threads: int = 1,
    leads: bool = True,
) -> None:
    """Trains, and measures on all test images after each epoch.

    Args:
        arguments: As :class:`Parser` has them.
        devices: Where to train.
        count: How many there are.
        make_learner: Returns what trains, given the images and how many of them a device has in a step.
        threads: How many of this process read photographs at a time.
        leads: Whether this process is the one of several that says what happens.
    """
    started = time.perf_counter()
    batch_size = per_device(arguments.batch_size, count)
    images = load(arguments.datadir, threads)
    if leads:
        print(images.told, flush=True)
    shoal.train(
        make_learner(images, batch_size),
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


def readers(sharing: int) -> int:
    """Returns how many decode photographs for each of the processes that share this machine: at most 8."""
    return min(cores_each(sharing), 8)
