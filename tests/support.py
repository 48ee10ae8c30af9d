"""Small learners, data and runs that many tests share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import shoal
from shoal.data import ArrayDataset, Population
from shoal.engines import ClientTask
from shoal.learners.batches import batch_sizes, draw_order
from shoal.runs import TIME_KEYS, USAGE_KEYS

FEATURES, CLASSES = 6, 3


def samples(count: int, *, seed: int = 0) -> ArrayDataset:
    """Returns samples of three overlapping classes."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(CLASSES, size=count)
    inputs = rng.normal(size=(count, FEATURES)) + 1.5 * np.eye(CLASSES, FEATURES)[targets]
    return ArrayDataset(inputs.astype(np.float32), targets, classes=CLASSES, name="samples")


def population(sizes: Sequence[int] = (7, 12, 5, 9, 20), *, seed: int = 0) -> Population:
    """Returns clients of the given sizes."""
    data = samples(sum(sizes), seed=seed)
    return Population(data, np.arange(len(data)), np.concatenate([[0], np.cumsum(sizes)]))


def tasks(clients: Population, cohort: Sequence[int]) -> list[ClientTask]:
    """Returns the tasks of a first round."""
    return [ClientTask(client=k, data=clients[k], seed=0, round=1) for k in cohort]


def batch_indices(count: int, *, rng: np.random.Generator, **settings: Any) -> list[np.ndarray]:
    """Returns the examples' indices batch by batch, as a learner sees them."""
    sizes = batch_sizes(count, **settings)
    return np.split(draw_order(count, sum(sizes), rng), np.cumsum(sizes[:-1]))


class Mlp(nn.Sequential):
    """A network with one hidden layer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def learner(model: Any = Mlp, *, lr: float = 0.1, **settings: Any) -> shoal.TorchLearner:
    """Returns a learner with plain SGD, unless the settings say otherwise."""
    settings = {"loss": F.cross_entropy, "optimizer": partial(torch.optim.SGD, lr=lr), "batch_size": 4, **settings}
    return shoal.TorchLearner(model, **settings)


def assert_equal(tree: Any, other: Any, *, atol: float = 0.0) -> None:
    """Asserts that two flat trees hold the same names and numbers, exactly unless a tolerance is given."""
    assert tree.keys() == other.keys()
    for name in tree:
        torch.testing.assert_close(
            torch.as_tensor(tree[name]),
            torch.as_tensor(other[name]),
            rtol=0,
            atol=atol,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def differ(tree: Any, other: Any) -> bool:
    """Tells whether any array of two flat trees differs."""
    return any(not torch.equal(torch.as_tensor(tree[name]), torch.as_tensor(other[name])) for name in tree)


def timeless(path: Path) -> list[str]:
    """Returns the lines of a ``metrics.jsonl`` without the measured times, and what was used of the machine."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    measured = TIME_KEYS | USAGE_KEYS
    return [json.dumps({key: value for key, value in record.items() if key not in measured}) for record in records]


def run_in_folder(run_dir: str, *, resume: bool, rounds: int = 40, seed: int = 3, engine: str = "sequential") -> None:
    """Runs a small federation with everything that a checkpoint must hold: momentum, buffers, validation, a best."""
    torch.set_num_threads(1)
    shoal.federate(
        learner(BatchNormNet, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
        population((7, 12, 5, 9, 20, 8, 6, 11)),
        rounds=rounds,
        cohort=4,
        engine=engine,
        algorithm=shoal.FedAdam(server_lr=0.05),
        seed=seed,
        evaluate=samples(60, seed=9),
        evaluate_every=2,
        client_validation=0.3,
        checkpoint_every=3,
        tensorboard=False,
        run_dir=run_dir,
        resume=resume,
    )


class BatchNormNet(nn.Sequential):
    """A network with running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(FEATURES, 8),
            nn.Unflatten(1, (4, 2)),
            nn.BatchNorm1d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(8, CLASSES),
        )


class Failing(nn.Module):
    """A network whose forward pass does what a test says, given the batch."""

    def __init__(self, act: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, CLASSES)
        self.act = act

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Acts while training, then scores."""
        if self.training:
            self.act(inputs)
        return self.inner(inputs)
