"""A site's part of the images that are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

import shoal
from shoal.data import Dataset
from shoal.errors import ConfigurationError, MissingDataError


def site_images(
    data_dir: Path | None, *, part: int, parts: int, alpha: float | None, most: int | None, seed: int
) -> tuple[TensorDataset, TensorDataset, str]:
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
    return tensors(own), tensors(own_test), told


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


def tensors(data: Dataset) -> TensorDataset:
    """Returns a data set as torch has it, in memory."""
    return TensorDataset(*map(torch.from_numpy, data.take(np.arange(len(data)))))
