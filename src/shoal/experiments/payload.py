"""A model of so many megabytes that trains in no time: what is left of a round is what it costs to move the model."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.data import ArrayDataset, Population
from shoal.devices import Devices
from shoal.errors import ConfigurationError
from shoal.federation import Experiment
from shoal.learners.torch import TorchLearner

INPUTS = 16
CLASSES = 4
EXAMPLES = 8
"""Of each client: one batch, one step."""

LARGEST_PART = 1 << 20
"""Numbers in the largest of the model's arrays, which are as large as those of a network of this size may be."""


class Payload(nn.Module):
    """A linear layer, and arrays that make the model as large as it is to be; all of them are trained.

    Args:
        numbers: Parameters of the model.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, CLASSES)
        rest = numbers - sum(own.numel() for own in self.linear.parameters())
        sizes = [LARGEST_PART] * (rest // LARGEST_PART) + [rest % LARGEST_PART]
        self.parts = nn.ParameterList(torch.zeros(size) for size in sizes if size)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns scores, [batch, classes]; those of the first class move with each number of the parts."""
        scores: Tensor = self.linear(inputs)
        moved = torch.stack([part.mean() for part in self.parts]).mean()
        return scores + moved * F.one_hot(torch.zeros((), dtype=torch.long), CLASSES)


def experiment(*, size_mb: float = 10.0, clients: int = 2, seed: int = 0) -> Experiment:
    """Returns federated averaging of a large model over clients that take one step each.

    Args:
        size_mb: Size of the model in megabytes, of float32.
        clients: How many clients, or sites.
        seed: Decides the data.

    Raises:
        ConfigurationError: The model is too small.
    """
    numbers = round(size_mb * 1e6 / 4)
    if not numbers > 2 * INPUTS * CLASSES:
        raise ConfigurationError(f"size_mb must be at least 0.001, not {size_mb}")
    rng = np.random.default_rng(seed)
    data = ArrayDataset(
        rng.normal(size=(clients * EXAMPLES, INPUTS)).astype(np.float32),
        rng.integers(CLASSES, size=clients * EXAMPLES),
        name="random numbers",
    )
    samples = np.arange(clients * EXAMPLES)
    names = [f"site-{number}" for number in range(1, clients + 1)]
    return Experiment(
        name="payload",
        learner=TorchLearner(
            partial(Payload, numbers),
            loss=F.cross_entropy,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            batch_size=EXAMPLES,
            epochs=1,
            devices=Devices(accelerator="cpu", threads=1),
        ),
        clients=Population(data, samples, np.arange(clients + 1) * EXAMPLES, names=names),
        rounds=5,
        checkpoint_every=10**6,
        seed=seed,
    )
