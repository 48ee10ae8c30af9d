"""What the ranks of Lightning's tests run: many fits and trainings one after the other, and what came of each."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import shoal
from lightning_modules import Classifier, CpuFsdp, Scheduled
from shoal import trees
from shoal.runs import TIME_KEYS
from shoal.types import Broadcast, LocalObjective, ModelState
from support import CLASSES, FEATURES, samples

MEASURED = TIME_KEYS | {"utilization", "memory_bytes"}
STRATEGIES = ("ddp", "fsdp", "fsdp in units")
GLOBAL_BATCH = 8


class Deep(nn.Module):
    """Layers of different sizes, and an array that does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh())
        self.second = nn.Linear(8, 5)
        self.last = nn.Linear(5, CLASSES)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        return self.last(torch.tanh(self.second(self.first(inputs)))) * self.scale


class Idle(Deep):
    """Has a layer that the loss does not reach, and the local objective does."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 3)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(FEATURES, FEATURES)
        self.other = nn.Linear(FEATURES, FEATURES)
        self.other.weight = self.one.weight
        self.last = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs):
        return self.last(torch.tanh(self.other(torch.tanh(self.one(inputs)))))


def frozen() -> nn.Module:
    """A network whose first layer is not trained."""
    model = Deep()
    model.first.requires_grad_(False)
    return model


def batch_norm() -> nn.Module:
    """A network with running statistics."""
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


class Clipping(Classifier):
    """Clips by the norm, whatever the strategy."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        model = self.trainer.strategy.model
        if hasattr(model, "clip_grad_norm_"):
            model.clip_grad_norm_(gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


class TwoOptimizers(Classifier):
    """Steps two optimizers by hand, of which one has no state."""

    def __init__(self, network=Deep):
        super().__init__(network)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        network = self.network
        rest = [*network.second.parameters(), *network.last.parameters(), network.scale]
        return [torch.optim.SGD(network.first.parameters(), lr=0.1), torch.optim.AdamW(rest, lr=0.01)]


class Disagreeing(Scheduled):
    """Measures what is worse with every epoch on rank 0, and better on the others."""

    measured = 0

    def validation_step(self, batch, index):
        Disagreeing.measured += 1
        sign = -1.0 if os.environ.get("RANK", "0") == "0" else 1.0
        self.log("accuracy", torch.tensor(sign * Disagreeing.measured))


deep = partial(Classifier, Deep)

FITS = {
    "plain": {"module": deep},
    "even": {"module": deep, "count": 24, "terms": True},
    "uneven": {"module": deep, "terms": True},
    "one left over": {"module": deep, "count": 17, "terms": True},
    "proximal": {"module": deep, "proximal": 0.5},
    "clipped by value": {"module": deep, "trainer": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}},
    "clipped by norm": {"module": partial(Clipping, Deep), "trainer": {"gradient_clip_val": 0.1}, "terms": True},
    "accumulated": {"module": deep, "accumulate": 2, "count": 32, "terms": True},
    "idle": {"module": partial(Classifier, Idle), "ddp": "ddp_find_unused_parameters_true", "terms": True},
    "tied": {"module": partial(Classifier, Tied), "terms": True, "strategies": ("ddp", "fsdp")},
    "frozen": {"module": partial(Scheduled, frozen), "terms": True, "calls": 2},
    "kept": {"module": partial(Scheduled, Deep), "calls": 2},
    "kept without a state": {"module": partial(Classifier, Deep, momentum=0.0), "calls": 2},
    "two optimizers": {"module": TwoOptimizers, "calls": 2, "terms": True, "strategies": ("ddp",)},
}
"""What must end as on one device with twice the batch size."""

OTHERS = {
    "buffers": {"module": partial(Classifier, batch_norm), "count": 24, "strategies": ("ddp", "fsdp")},
    "bf16": {"module": deep, "trainer": {"precision": "bf16-mixed"}, "count": 24},
}
"""What must end alike on all ranks."""

TRAINED = {"epochs": 3, "seed": 3, "tensorboard": False, "keep_checkpoints": 99}


def options(strategy, world):
    """Returns the trainer options of a rank."""
    if world == 1:
        return {"accelerator": "cpu"}
    units = {"auto_wrap_policy": {nn.Linear}} if strategy == "fsdp in units" else {}
    return {"accelerator": "cpu", "devices": world, "strategy": CpuFsdp(**units) if "fsdp" in strategy else strategy}


def fit(job, strategy, world):
    """Returns what came of one job's calls to ``fit``, the last of which goes on from what the others carried."""
    job = dict(job)
    strategy = job.get("ddp", strategy) if strategy == "ddp" else strategy
    count, calls, accumulate = job.get("count", 21), job.get("calls", 1), job.get("accumulate", 1)
    accumulate = accumulate if world > 1 else 1
    trainer = options(strategy, world) | job.get("trainer", {}) | {"accumulate_grad_batches": accumulate}
    make = partial(
        shoal.LightningLearner, job["module"], trainer=trainer,
        batch_size=GLOBAL_BATCH * (2 if job.get("accumulate") else 1) // (world * accumulate),
        epochs=2, keep_optimizer=calls > 1,
    )  # fmt: skip
    model = make().init(0)
    terms = LocalObjective(proximal=job.get("proximal", 0.0))
    if job.get("terms"):
        rng = np.random.default_rng(4)
        correction = {name: 0.05 * torch.tensor(rng.normal(size=p.shape)).float() for name, p in model.params.items()}
        terms = LocalObjective(proximal=0.2, correction=correction)
    carried, found = None, []
    for call in range(calls):
        learner = make()
        if carried:
            learner.take_up(*carried)
        update = learner.fit(
            Broadcast(round=1, model=model, objective=terms), samples(count), np.random.default_rng(call)
        )
        carried = learner.carried() if calls > 1 else None
        model = ModelState(
            params=trees.advance(model.params, update.delta),
            buffers=trees.advance(model.buffers, update.buffers),
            constants=model.constants,
        )
        found.append(dict(update.metrics))
    arrays = {f"carried/{name}": array for name, array in (carried[0] if carried else {}).items()}
    return {"arrays": listed(model.params | model.buffers | arrays), "metrics": found}


def listed(arrays):
    """Returns arrays as JSON."""
    return {name: array.double().tolist() for name, array in arrays.items()}


def train(strategy, world, **asked):
    """Returns what came of a training."""
    module = asked.pop("module", partial(Scheduled, Deep))
    learner = shoal.LightningLearner(module, trainer=options(strategy, world), batch_size=GLOBAL_BATCH // world)
    result = shoal.train(learner, samples(37), evaluate=samples(23, seed=5), **(TRAINED | asked))
    return {
        "arrays": listed(result.last_params),
        "history": [{k: v for k, v in record.items() if k not in MEASURED} for record in result.history],
        "stopped": result.stopped,
    }


def cut(run, copied, *, after=1):
    """Copies a run as it was after some epochs."""
    shutil.copytree(run, copied, symlinks=True)
    for late in (copied / "checkpoints").glob("step-*"):
        if int(late.name.removeprefix("step-")) > after:
            shutil.rmtree(late)
    return copied


def resumed(run, folder, name, strategy, world):
    """Returns what came of a training that goes on from another's first epoch."""
    copied = folder / name
    if os.environ.get("RANK", "0") == "0":  # the other rank waits for this one to begin
        cut(run, copied)
    return train(strategy, world, run_dir=copied, resume=True)


def main():
    """Runs everything on this rank, and writes what came of it."""
    warnings.simplefilter("error")
    # Lightning's FSDP computes in 16 bits by CUDA's autocast, beside torch's own casts.
    warnings.filterwarnings("ignore", message="CUDA is not available", category=UserWarning)
    gc.freeze()  # what was imported need not be looked through after each training
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {}
    for strategy in ("ddp", "fsdp in units"):
        run = folder / strategy
        found[f"training, {strategy}"] = train(strategy, world, run_dir=run)
        found[f"resumed, {strategy}"] = resumed(run, folder, f"{strategy} resumed", strategy, world)
        found[f"from one, {strategy}"] = resumed(folder / "one", folder, f"{strategy} from one", strategy, world)
    found["early"] = train("ddp", world, module=Disagreeing, metric="accuracy", patience=1, epochs=9)
    found |= {
        f"{name}, {strategy}": fit(job, strategy, world)
        for name, job in (FITS | OTHERS).items()
        for strategy in job.get("strategies", STRATEGIES)
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    import lightning_ranks  # so that what is trained has the same name however this was started

    lightning_ranks.main()
