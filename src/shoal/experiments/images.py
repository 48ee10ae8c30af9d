"""What the image experiments share: label-skewed clients, and a CNN trained by SGD with momentum."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from shoal import data
from shoal.data import ArrayDataset
from shoal.federation import Experiment
from shoal.learners.torch import TorchLearner, scale_pixels


def image_experiment(
    name: str,
    model: type[nn.Module],
    train: ArrayDataset,
    test: ArrayDataset,
    *,
    clients: int,
    alpha: float,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    rounds: int,
) -> Experiment:
    """Returns an experiment on 8-bit images, the labels skewed over the clients by Dirichlet(alpha)."""
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
