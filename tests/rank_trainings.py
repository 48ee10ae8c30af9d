"""What ranks run that tests start: trainings of every kind one after the other, and what came of each on each rank."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed.fsdp  # slow to import, and wanted by every rank
from torch import nn
from torch.nn import functional as F

import shoal
from shoal.data import ArrayDataset
from shoal.errors import ShoalError
from shoal.runs import TIME_KEYS
from support import CLASSES, FEATURES, BatchNormNet, Mlp, learner, samples

GLOBAL_BATCH = 12
MEASURED = TIME_KEYS | {"utilization", "memory_bytes"}

dtypes: set[str] = set()
coming: list[float] = []
pause = 0.0


class Noted(nn.Linear):
    """Notes in what dtype it computes."""

    def forward(self, inputs):
        output = super().forward(inputs)
        dtypes.add(f"{str(output.dtype).removeprefix('torch.')} in {'training' if self.training else 'evaluation'}")
        return output


class Deep(nn.Module):
    """Blocks in a list, which are divided one by one, and the rest around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), Noted(8, 8), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(8, CLASSES)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden) * self.scale


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(FEATURES, FEATURES)
        self.other = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh())
        self.other[0].weight = self.one.weight
        self.last = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs):
        return self.last(self.other(torch.tanh(self.one(inputs))))


def frozen() -> nn.Module:
    """A network whose first block is not trained."""
    model = Deep()
    model.first.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    return model


def batch_norm() -> nn.Module:
    """Without dropout, whose noise is each rank's own."""
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


def scripted(output, target):
    """An accuracy that is what a test says, measurement by measurement."""
    return torch.tensor(coming.pop(0) if coming else 0.0)


def scores(output, target):
    """A metric that changes with every bit of the scores."""
    return output.double().mean()


def slow_loss(output, target):
    """Cross entropy, at a pace for tests."""
    time.sleep(pause)
    return F.cross_entropy(output, target)


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)

KINDS = {
    "plain": {"model": Mlp, "optimizer": SGD},
    "still": {"model": Deep, "optimizer": partial(torch.optim.SGD, lr=0.0), "eval_batch_size": 5},
    "one batch": {"model": Mlp, "optimizer": partial(torch.optim.SGD, lr=0.0)},
    "adamw": {"model": Deep, "optimizer": ADAMW, "schedule": shoal.WarmupCosine(warmup_epochs=1)},
    "clip": {"model": Deep, "optimizer": SGD, "clip_norm": 0.05},
    "tied": {"model": Tied, "optimizer": SGD},
    "frozen": {"model": frozen, "optimizer": SGD},
    "buffers": {"model": batch_norm, "optimizer": SGD, "metrics": {"accuracy": scores}},
    "dropout": {"model": BatchNormNet, "optimizer": SGD},
    "early": {"model": Deep, "optimizer": SGD, "metrics": {"accuracy": scripted}},
    "slow": {"model": Deep, "optimizer": ADAMW, "loss": slow_loss, "train_metrics": True},
    "lbfgs": {"model": Mlp, "optimizer": torch.optim.LBFGS},
}
"""What is trained, and how."""


def train(job, world=1):
    """Runs one training as this rank.

    Args:
        job: Its ``kind``; ``strategy`` (else single, or ddp with several ranks), ``batch`` over all devices,
            ``accumulate``, ``precision``, ``examples``, ``ignored`` labels; ``slow`` seconds a batch; further settings.
        world: How many ranks there are.
    """
    global pause  # noqa: PLW0603
    job = dict(job)
    job.pop("name", None)
    strategy = job.pop("strategy", "ddp") if world > 1 else job.pop("alone", "single")
    job.pop("alone", None)
    job.pop("strategy", None)
    accumulate = job.pop("accumulate", 1)
    accumulate = accumulate if world > 1 else 1
    precision = job.pop("precision", "fp32")
    pause = job.pop("slow", 0.0)
    coming[:] = job.pop("script", [])
    data = samples(job.pop("examples", 41))
    if job.pop("ignored", False):
        labels = data.targets().copy()
        labels[::3] = -100
        data = ArrayDataset(data.inputs, labels)
    one = learner(
        **KINDS[job.pop("kind", "plain")],
        batch_size=job.pop("batch", GLOBAL_BATCH) // (world * accumulate),
        accumulate=accumulate,
        devices=shoal.Devices(strategy, accelerator="cpu", threads=1, precision=precision),
    )
    settings = {"epochs": 4, "evaluate": samples(23, seed=5), "tensorboard": False, "seed": 3, **job}
    return shoal.train(one, data, **settings)


def told(result):
    """Returns what came of a training, as JSON."""
    return {
        "params": {name: array.double().tolist() for name, array in result.params.items()},
        "last": {name: array.double().tolist() for name, array in result.last_params.items()},
        "history": [{k: v for k, v in record.items() if k not in MEASURED} for record in result.history],
        "classes": [vars(report) for report in result.classes],
        "best": result.best and vars(result.best),
        "stopped": result.stopped,
        "notices": list(result.notices),
    }


def main():
    """Runs the trainings of a JSON file, and writes what came of each."""
    source, target = map(Path, sys.argv[1:3])
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    found = {}
    for job in json.loads(source.read_text()):
        dtypes.clear()
        try:
            found[job["name"]] = told(train(job, world)) | {"dtypes": sorted(dtypes)}
        except ShoalError as error:
            found[job["name"]] = {"error": type(error).__name__, "message": str(error)}
    (target / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    import rank_trainings  # so that what is trained has the same name however this was started

    rank_trainings.main()
