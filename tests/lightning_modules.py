"""Lightning modules that tests train; importable, so that spawned ranks find them."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F

import shoal
from shoal.types import Broadcast, LocalObjective
from support import Mlp, samples


class Classifier(LightningModule):
    """Any network, trained with cross entropy and SGD."""

    def __init__(self, network=Mlp, lr=0.1, momentum=0.9):
        super().__init__()
        self.network = network()
        self.lr, self.momentum = lr, momentum

    def training_step(self, batch, index):
        inputs, targets = batch
        loss = F.cross_entropy(self.network(inputs), targets)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        inputs, targets = batch
        output = self.network(inputs)
        self.log("loss", F.cross_entropy(output, targets))
        self.log("accuracy", (output.argmax(1) == targets).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class CpuFsdp(FSDPStrategy):
    """Lightning's FSDP on a CPU, where Lightning itself names no device, and torch wants one."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy, **self.kwargs,
        )  # fmt: skip


class Scheduled(Classifier):
    """Has Adam, and schedules that count epochs and steps."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        schedules = torch.optim.lr_scheduler
        slower = schedules.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
        warm = schedules.LinearLR(optimizer, start_factor=0.2, total_iters=7)
        return [optimizer], [slower, {"scheduler": warm, "interval": "step", "frequency": 2}]


class Dying(Classifier):
    """Rank 1 is killed at its second batch."""

    def training_step(self, batch, index):
        if self.global_rank == 1 and index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, index)


class Failing(Classifier):
    """Rank 1 raises at its second batch."""

    def training_step(self, batch, index):
        if self.global_rank == 1 and index == 1:
            raise ZeroDivisionError("the user's own mistake")
        return super().training_step(batch, index)


def fit(learner, *, count=22, seed=1, objective=None):
    """Trains on so many samples."""
    broadcast = Broadcast(round=1, model=learner.init(0), objective=objective or LocalObjective())
    return learner.fit(broadcast, samples(count), np.random.default_rng(seed))


def ranked(strategy, module=Classifier, **settings):
    """Returns a learner with two ranks on the CPU."""
    options = {"accelerator": "cpu", "strategy": strategy, "devices": 2} | settings.pop("trainer", {})
    return shoal.LightningLearner(module, trainer=options, **({"batch_size": 4, "epochs": 2} | settings))


def script():
    """Is a user's program: it writes the update of a learner with two ranks, for the launcher's rank."""
    warnings.simplefilter("error")
    folder, strategy = Path(sys.argv[1]), sys.argv[2]
    update = fit(ranked(strategy))
    told = {"delta": {name: array.tolist() for name, array in update.delta.items()}, "metrics": dict(update.metrics)}
    (folder / f"update-{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    script()
