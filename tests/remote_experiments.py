"""Experiments that tests run at real sites: ``experiment`` is what sites allow as a file."""

from __future__ import annotations

import json
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import shoal
from site_jobs import SCRIPT, START, site_of
from support import CLASSES, FEATURES, population, samples


class Halved(nn.Module):
    """A network in bfloat16, and with an array of each further kind that a model may have."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(FEATURES, CLASSES, dtype=torch.bfloat16)
        self.register_buffer("mean", torch.zeros(FEATURES, dtype=torch.float64))

    def forward(self, inputs):
        return self.inner(inputs.bfloat16()).float()


class Plain(nn.Sequential):
    """A network with running statistics."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


def experiment(*, kind: str = "plain", rounds: int = 3, told: str = "{}"):
    """Returns an experiment.

    Args:
        kind: ``plain``, ``bfloat16``: two clients of a learner; ``script``: a job of sites.
        rounds: How many.
        told: JSON. Of a script: ``sites`` (ranks by name), ``script`` (what it is told), ``job`` (its settings) and
            ``waits``.
    """
    if kind == "script":
        more = json.loads(told)
        return shoal.Job(
            "try",
            script=SCRIPT,
            args=[json.dumps(more["script"])],
            model={"w": START},
            sites=[site_of(name, ranks) for name, ranks in more["sites"].items()],
            accelerator="cpu",
            rounds=rounds,
            waits=shoal.Deadlines(**{"reply": 30, "silence": 5, "finish": 20, "start": 60, **more.get("waits", {})}),
            **more.get("job", {}),
        )
    learner = shoal.TorchLearner(
        Halved if kind == "bfloat16" else Plain,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        batch_size=4,
        epochs=2,
        devices=shoal.Devices(accelerator="cpu", threads=1),
    )
    return shoal.Experiment(
        name="plain",
        learner=learner,
        clients=population((12, 20)),
        evaluate=samples(60, seed=9),
        rounds=rounds,
        seed=5,
        tensorboard=False,
    )
