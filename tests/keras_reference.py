"""What torch learners make of the linear model that the tests of Keras train.

A program, because TensorFlow and torch may bring libraries that do not get on in one process.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from shoal.data import ArrayDataset
from shoal.types import LocalObjective

FEATURES, CLASSES = 6, 5
KERNEL, BIAS = "sequential/dense/kernel", "sequential/dense/bias"
LIMITS = {"epochs": {"epochs": 3}, "steps": {"steps": 25}}
OBJECTIVE = LocalObjective(
    proximal=0.7,
    correction={
        KERNEL: np.linspace(-0.1, 0.1, FEATURES * CLASSES, dtype=np.float32).reshape(FEATURES, CLASSES),
        BIAS: np.linspace(-0.1, 0.1, CLASSES, dtype=np.float32),
    },
)
OBJECTIVES = {"plain": LocalObjective(), "objective": OBJECTIVE}


def data(count=75, seed=0):
    """Returns samples of no structure."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, FEATURES)).astype(np.float32)
    return ArrayDataset(inputs, rng.integers(CLASSES, size=count), classes=CLASSES)


def clients():
    """Returns clients of several sizes, one of them with a single example."""
    return [data(count, seed) for seed, count in enumerate((9, 13, 6, 1, 10))]


def methods():
    """Returns algorithms by name."""
    import shoal

    chosen = (shoal.FedAvg(), shoal.FedProx(mu=0.5), shoal.FedAdam(server_lr=0.05), shoal.FedAvgM(momentum=0.5))
    return {type(method).__name__: method for method in chosen}


def start():
    """Returns the weights that a single call to fit starts from."""
    rng = np.random.default_rng(7)
    return {
        KERNEL: rng.normal(size=(FEATURES, CLASSES)).astype(np.float32) * 0.3,
        BIAS: np.zeros(CLASSES, np.float32),
    }


def computed():
    """Returns what the program tells, from a process of its own."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main():
    """Trains everything, and writes it as JSON."""
    from functools import partial

    import torch
    from torch.nn import functional as F

    import shoal
    from shoal.types import Broadcast, ModelState

    def linear():
        made = torch.nn.Linear(FEATURES, CLASSES)
        for parameter in made.parameters():
            torch.nn.init.zeros_(parameter)
        return made

    def learner(**settings):
        optimizer = partial(torch.optim.SGD, lr=0.1)
        return shoal.TorchLearner(linear, loss=F.cross_entropy, optimizer=optimizer, train_metrics=True, **settings)

    def turned(tree):
        return {"weight": torch.as_tensor(tree[KERNEL]).T, "bias": torch.as_tensor(tree[BIAS])}

    def told(tree):
        return {KERNEL: np.asarray(tree["weight"]).T.tolist(), BIAS: np.asarray(tree["bias"]).tolist()}

    def fitted(objective, limits, batch_size):
        ours = learner(batch_size=batch_size, **limits)
        wanted = LocalObjective(
            proximal=objective.proximal, correction=objective.correction and turned(objective.correction)
        )
        model = ModelState(params=turned(start()))
        update = ours.fit(Broadcast(round=1, model=model, objective=wanted), data(), np.random.default_rng(3))
        return {"delta": told(update.delta), "metrics": dict(update.metrics), "measured": ours.evaluate(model, data())}

    def federated(method):
        result = shoal.federate(
            learner(batch_size=4, epochs=2), clients(), rounds=4, cohort=4, algorithm=method, evaluate=clients()[1],
            engine="sequential",
        )  # fmt: skip
        history = [{name: record[name] for name in ("accuracy", "train_loss")} for record in result.history]
        return {"params": told(result.params), "history": history}

    def trained():
        result = shoal.train(learner(batch_size=8), data(45), epochs=3, evaluate=data(20, 1), seed=1)
        names = ("loss", "accuracy", "train_loss", "train_accuracy", "learning_rate")
        history = [{name: record[name] for name in names} for record in result.history]
        return {"params": told(result.params), "history": history, "classes": [vars(one) for one in result.classes]}

    found = {
        "fits": {
            f"{objective}, {limits}, {size}": fitted(OBJECTIVES[objective], LIMITS[limits], size)
            for objective in OBJECTIVES
            for limits in LIMITS
            for size in (8, None)
        },
        "federations": {name: federated(method) for name, method in methods().items()},
        "training": trained(),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
