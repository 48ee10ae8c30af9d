"""What the ranks of a site run in tests: fits of every kind one after the other, and what came of each on each rank."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn

import shoal
from rank_trainings import ADAMW, SGD, Deep, Tied, frozen
from shoal.errors import ShoalError
from shoal.types import Broadcast, LocalObjective
from support import CLASSES, FEATURES, Mlp, learner, samples

GLOBAL_BATCH = 12

noise: list[float] = []
counts: dict[str, int] = {}
left = float("inf")


class Noisy(Mlp):
    """Notes the noise that each batch meets in training."""

    def forward(self, inputs):
        """Scores."""
        if self.training:
            noise.append(float(torch.rand(())))
        return super().forward(inputs)


class Dying(nn.Linear):
    """Ends its process at a certain batch."""

    def __init__(self) -> None:
        super().__init__(FEATURES, CLASSES)

    def forward(self, inputs):
        """Scores."""
        global left  # noqa: PLW0603
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(inputs)


def batch_norm() -> nn.Module:
    """Running statistics to which one example is enough."""
    return nn.Sequential(nn.Unflatten(1, (3, 2)), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(FEATURES, CLASSES))


def scores(output, target):
    """A metric that changes with every bit of the scores."""
    return output.double().mean()


KINDS = {
    "plain": {"model": Deep, "optimizer": SGD},
    "adamw and a schedule": {
        "model": Mlp, "optimizer": ADAMW, "schedule": shoal.WarmupCosine(warmup_epochs=1), "epochs": 2,
    },
    "clipping and accumulation": {"model": Mlp, "optimizer": SGD, "clip_norm": 0.05, "accumulate": 2},
    "steps": {"model": Mlp, "optimizer": SGD, "steps": 5, "train_metrics": True},
    "one batch": {"model": Mlp, "optimizer": SGD, "batch_size": None, "epochs": 2},
    "tied": {"model": Tied, "optimizer": SGD},
    "frozen": {"model": frozen, "optimizer": SGD},
    "buffers": {"model": batch_norm, "optimizer": partial(torch.optim.SGD, lr=0.0)},
    "noise": {"model": Noisy, "optimizer": SGD},
    "lbfgs": {"model": Mlp, "optimizer": torch.optim.LBFGS},
    "dying": {"model": Dying, "optimizer": SGD},
}  # fmt: skip
"""What is trained, and how."""

FITS = (
    {"examples": 41, "model": 1},
    {"examples": 37, "model": 2, "proximal": 0.3},
    {"examples": 25, "model": 3, "correction": 7},
    {"examples": 5, "model": 4, "proximal": 0.3, "correction": 8},
    {"examples": 41, "model": 1},
)
"""What comes one after the other; the last is the first again."""


def made(kind, strategy="single", world=1):
    """Returns a learner of a kind, whose steps are the same on any number of devices."""
    settings = {"batch_size": GLOBAL_BATCH, "metrics": {"scores": scores}, "eval_batch_size": 5, **KINDS[kind]}
    if world == 1:
        settings.pop("accumulate", None)
    elif settings["batch_size"]:
        settings["batch_size"] //= world * settings.get("accumulate", 1)
    return learner(**settings, devices=shoal.Devices(strategy, accelerator="cpu", threads=1))


def broadcast(one, fit):
    """Returns what a fit starts from."""
    model = one.init(fit["model"])
    correction = None
    if "correction" in fit:
        rng = np.random.default_rng(fit["correction"])
        correction = {name: 0.1 * rng.normal(size=tuple(array.shape)) for name, array in model.params.items()}
        correction = {name: array.astype(np.float32) for name, array in correction.items()}
    objective = LocalObjective(proximal=fit.get("proximal", 0.0), correction=correction)
    return Broadcast(round=1, model=model, objective=objective)


def fitted(trainer, one, fit):
    """Returns what came of a fit, as JSON."""
    noise.clear()
    update = trainer.fit(broadcast(one, fit), samples(fit["examples"]), np.random.default_rng(5))
    arrays = {"delta": update.delta, "buffers": update.buffers}
    assert all(array.dtype == torch.float64 for tree in arrays.values() for array in tree.values())
    trees = {
        part: {name: torch.as_tensor(array).tolist() for name, array in tree.items()} for part, tree in arrays.items()
    }
    return trees | {"weight": update.weight, "metrics": dict(update.metrics), "noise": list(noise)}


def evaluated(trainer, one, fit):
    """Returns what a fit's first model is worth on other examples."""
    return trainer.evaluate(one.init(fit["model"]), samples(23, seed=9))


def refused(call):
    """Returns how a call ends that cannot be."""
    try:
        call()
    except ShoalError as error:
        return [type(error).__name__, str(error)]
    return []


def counted(module, name):
    """Counts the calls of a function from now on."""
    function = getattr(module, name)

    def counting(*arguments, **named):
        counts[name] = counts.get(name, 0) + 1
        return function(*arguments, **named)

    setattr(module, name, counting)


def run(kind, strategy, world):
    """Returns what came of all fits of a kind."""
    one = made(kind, strategy, world)
    counts.clear()
    with one.together() as trainer:
        first = dict(counts)
        found = {"fits": [fitted(trainer, one, fit) for fit in FITS]}
        found["refused"] = [
            refused(lambda: fitted(trainer, one, {"examples": world - 1, "model": 1})),
            refused(lambda: trainer.evaluate(one.init(1), samples(0))),
        ]
        found["evaluations"] = [evaluated(trainer, one, fit) for fit in FITS]
        found["again"] = fitted(trainer, one, FITS[1])
    return found | {"made": [first, dict(counts)], "left": dist.is_initialized()}


def main():
    """Runs what is asked for, and writes what came of each."""
    global left  # noqa: PLW0603
    target, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    counted(dist, "init_process_group")
    counted(nn.parallel, "DistributedDataParallel")
    counted(torch.distributed.fsdp, "fully_shard")
    found = {}
    for kind, strategy in asked:
        if kind == "dying" and rank == world - 1:
            left = 5
        try:
            found[f"{kind}, {strategy}"] = run(kind, strategy, world)
        except ShoalError as error:
            found[f"{kind}, {strategy}"] = {"error": type(error).__name__, "message": str(error)}
    (target / f"rank-{rank}.json").write_text(json.dumps(found))
