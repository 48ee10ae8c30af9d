"""What the image experiments share: label-skewed clients, and a CNN trained by SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from shoal import data
from shoal.data import ArrayDataset
from shoal.federation import Experiment
from shoal.learners.torch import TorchLearner, scale_pixels

Loader = Callable[..., tuple[ArrayDataset, ArrayDataset]]


def label_skewed(name: str, model: type[nn.Module], load: Loader, *, rounds: int) -> Callable[..., Experiment]:
    """Returns the function of an experiment on 8-bit images.

    Args:
        name: Heads the report.
        model: Takes images as float32 in 0 to 1.
        load: Returns training and test data, given ``data_dir``.
        rounds: Number of rounds, unless the command line says otherwise.
    """

    def experiment(
        *,
        clients: int = 100,
        alpha: float = 0.3,
        lr: float = 0.05,
        epochs: int = 1,
        batch_size: int = 32,
        data_dir: str | None = None,
        seed: int = 0,
    ) -> Experiment:
        """Returns a CNN on images whose labels are skewed over the clients by Dirichlet(alpha).

        Args:
            clients: Size of the population.
            alpha: Concentration of the label skew; small is more skewed.
            lr: The clients' learning rate.
            epochs: Local passes over a client's data.
            batch_size: Examples in a batch.
            data_dir: Where the data set's files lie, or are to be put.
            seed: Decides the partition.
        """
        train, test = load(data_dir=Path(data_dir) if data_dir else None)
        return Experiment(
            name=name,
            learner=TorchLearner(
                model,
                loss=F.cross_entropy,
                optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9),
                batch_size=batch_size,
                epochs=epochs,
                transform=scale_pixels,
            ),
            clients=data.partition(train, data.Dirichlet(clients=clients, alpha=alpha), seed=seed),
            evaluate=test,
            rounds=rounds,
            cohort=min(10, clients),
            seed=seed,
        )

    return experiment
