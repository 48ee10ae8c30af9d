"""A training that tests run, kill and resume: digits at a pace that leaves time for it."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import shoal
from shoal.devices import Launched


class SmoothNet(nn.Sequential):
    """Digits in, ten scores out, without kinks, which would make much of a difference in the last bit."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))


class PacedLoss:
    """Cross entropy that takes its time, and that rank 1 may stumble over.

    Args:
        pause: Seconds that each batch takes longer.
        fail_at: The batch in which rank 1 raises; 0 for none.
    """

    def __init__(self, pause: float, fail_at: int) -> None:
        self._pause = pause
        self._fail_at = fail_at
        self._calls = 0

    def __call__(self, output, target):
        self._calls += 1
        time.sleep(self._pause)
        place = Launched.here()
        if self._calls == self._fail_at and place is not None and place.rank == 1:
            raise ArithmeticError("rank 1 cannot go on")
        return F.cross_entropy(output, target)

    def describe(self):
        """The numbers are the same at any pace."""
        return "cross entropy"


def training(*, pause: float = 0.0, fail_at: int = 0, seed: int = 0) -> shoal.Training:
    """Returns a training of three epochs.

    Args:
        pause: Seconds that each batch takes longer.
        fail_at: The batch in which rank 1 raises; 0 for none.
        seed: Decides the split of the data and the run.
    """
    train, test = shoal.data.digits(seed=seed)
    learner = shoal.TorchLearner(
        SmoothNet,
        loss=PacedLoss(pause, fail_at),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        batch_size=32,
        schedule=shoal.WarmupCosine(warmup_epochs=1),
        devices=shoal.Devices(accelerator="cpu", threads=1),
    )
    return shoal.Training(name="paced", learner=learner, data=train, evaluate=test, epochs=3, seed=seed)
