"""A site's part of the images that are at hand, as a LightningDataModule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

import shoal
from shoal.data import Dataset
from shoal.errors import ConfigurationError, MissingDataError


class SiteImages(LightningDataModule):
    """What a site trains on, and one half each of its test images to validate and to test with.

    Lightning divides each among the ranks.

    Args:
        data_dir: Where CIFAR-10 or Fashion-MNIST lies; None to look where they usually are.
        part: Which site's they are, from 0 to ``parts`` - 1.
        parts: How many sites share the images; each has its own.
        alpha: How unequally the labels are shared, by Dirichlet(alpha); None to deal the images out at random.
        most: To use only the first so many training images; None for all.
        batch_size: Of each device.
        seed: Decides who has which.
    """

    def __init__(
        self,
        data_dir: Path | None,
        *,
        part: int = 0,
        parts: int = 1,
        alpha: float | None = None,
        most: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        train, test = at_hand(data_dir)
        used = shoal.data.Subset(train, np.arange(len(train))[:most])
        iid = shoal.data.IID(clients=parts)
        rule = shoal.data.Dirichlet(clients=parts, alpha=alpha) if alpha else iid
        own = shoal.data.partition(used, rule, seed=seed)[part]
        held_out = shoal.data.partition(test, iid, seed=seed)[part]
        self.batch_size = batch_size
        self.train = tensors(own)
        self.validation, self.test = (
            tensors(half) for half in shoal.data.partition(held_out, shoal.data.IID(clients=2), seed=seed)
        )
        self.told = f"{train.name}: {len(own):,} of {len(train):,} images to train on, {len(held_out):,} held out"

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Returns what to train on, in another order in each epoch."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Returns what to measure the global model on."""
        return DataLoader(self.validation, batch_size=500)

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Returns what to measure the site's best model on."""
        return DataLoader(self.test, batch_size=500)

    predict_dataloader = test_dataloader


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
