"""A site's part of the images that are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import shoal
from shoal.data import Dataset
from shoal.errors import ConfigurationError, MissingDataError

Images = tuple[np.ndarray, np.ndarray]
"""Images [n, height, width, 1 or 3] in 8 bits, and their labels [n]."""


def site_images(
    data_dir: Path | None, *, part: int, parts: int, alpha: float | None, most: int | None, seed: int
) -> tuple[Images, Images, str]:
    """Returns a site's images to train on and to test with, and a line that says what they are.

    Args:
        data_dir: Where CIFAR-10 or Fashion-MNIST lies; None to look where they usually are.
        part: Which site's they are, from 0 to ``parts`` - 1.
        parts: How many sites share the images; each has its own.
        alpha: How unequally the labels are shared, by Dirichlet(alpha); None to deal the images out at random.
        most: To use only the first so many training images; None for all.
        seed: Decides who has which.
    """
    train, test = at_hand(data_dir)
    used = shoal.data.Subset(train, np.arange(len(train))[:most])
    iid = shoal.data.IID(clients=parts)
    rule = shoal.data.Dirichlet(clients=parts, alpha=alpha) if alpha else iid
    own, own_test = (shoal.data.partition(*divided, seed=seed)[part] for divided in ((used, rule), (test, iid)))
    told = f"{train.name}: {len(own):,} of {len(train):,} images to train on, {len(own_test):,} to test with"
    return arrays(own), arrays(own_test), told


def at_hand(data_dir: Path | None) -> tuple[shoal.data.ArrayDataset, shoal.data.ArrayDataset]:
    """Returns CIFAR-10 where it is, else Fashion-MNIST, else the digits that come with scikit-learn."""
    for load in (shoal.data.cifar10, shoal.data.fashion_mnist):
        try:
            return load(data_dir=data_dir, download=False)
        except MissingDataError:
            continue
    if data_dir is not None:
        raise ConfigurationError(f"{data_dir} has neither CIFAR-10 nor Fashion-MNIST: ./prepare_data.sh {data_dir}")
    return shoal.data.digits()


def arrays(data: Dataset) -> Images:
    """Returns a data set as Keras has it, channels last, in memory."""
    images, labels = data.take(np.arange(len(data)))
    eight_bits = images if images.dtype == np.uint8 else np.rint(255 * images).astype(np.uint8)  # the digits are 0 to 1
    return eight_bits.transpose(0, 2, 3, 1), labels
