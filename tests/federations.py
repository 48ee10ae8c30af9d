"""What processes run that tests start: an experiment file for the command, a user's script, and faults at any place."""

from __future__ import annotations

import functools
import importlib
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import shoal
from shoal.data import ArrayDataset
from shoal.errors import ConfigurationError
from support import BatchNormNet, learner, population, samples

FAULT = "SHOAL_TEST_FAULT"
SIZES = (7, 12, 5, 9, 20, 8, 6, 11)

rest = 0.0
broken: list[int] = []


class Data(ArrayDataset):
    """Some samples cannot be read, and reading takes as long as a test wants."""

    def take(self, indices):
        time.sleep(rest)
        if set(broken) & set(np.asarray(indices).tolist()):
            raise ZeroDivisionError("the user's own data")
        return super().take(indices)


def experiment(pause: float = 0.0, failing: int = 0, differs: str = ""):
    """Has everything that workers must share: momentum, buffers, validation, a best model, unequal clients.

    Args:
        pause: Seconds that each batch takes longer.
        failing: How many clients fail, from the last one on; nobody is validated then.
        differs: What worker 1 has otherwise.
    """
    global rest, broken  # noqa: PLW0603
    torch.set_num_threads(1)
    rest, broken = pause, np.cumsum(SIZES)[len(SIZES) - failing :].tolist()
    broken = [end - 1 for end in broken]
    one = os.environ.get("RANK") == "1"
    if one and differs == "file":
        raise ConfigurationError("this machine lacks a file")
    clients = population(SIZES, seed=1 if one and differs == "data" else 0)
    clients.dataset.__class__ = Data
    return shoal.Experiment(
        name="together",
        learner=learner(BatchNormNet, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
        clients=clients,
        rounds=6,
        cohort=5,
        algorithm=shoal.FedAdam(server_lr=0.05),
        engine="sequential",
        seed=4 if one and differs == "seed" else 3,
        evaluate=samples(60, seed=9),
        evaluate_every=2,
        client_validation=0.0 if failing else 0.3,
        tensorboard=False,
    )


def command():
    """Is ``shoal``, with the fault that the environment tells of."""
    from shoal.cli.main import main

    install_fault()
    main()


def install_fault():
    """Has a function of this worker's do something at one of its calls: send it a signal, raise, or take seconds."""
    fault = json.loads(os.environ.get(FAULT, "{}"))
    if str(fault.get("rank")) != os.environ.get("RANK"):
        return
    module, _, name = fault["where"].partition(":")
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    original, calls = getattr(owner, last), 0

    def act():
        if fault["does"] == "raise":
            raise ZeroDivisionError("a fault of the test's")
        if isinstance(fault["does"], float):
            time.sleep(fault["does"])
            return
        os.kill(os.getpid(), fault["does"])
        time.sleep(0.05)  # it may be another thread that the system gives the signal to

    @functools.wraps(original)
    def faulty(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == fault["call"] and not fault["after"]:
            act()
        returned = original(*args, **kwargs)
        if calls == fault["call"] and fault["after"]:
            act()
        return returned

    setattr(owner, last, faulty)


def script():
    """Is a user's script under a launcher: two federations in a row, and what each worker got of them."""
    for seed, engine in ((3, "sequential"), (5, shoal.engines.SequentialEngine())):
        asked = experiment()
        result = shoal.federate(
            asked.learner, asked.clients, rounds=3, cohort=5, algorithm=shoal.FedAdam(server_lr=0.05), seed=seed,
            evaluate=samples(60, seed=9), engine=engine,
        )  # fmt: skip
        told = {
            "params": {name: array.tolist() for name, array in result.params.items()},
            "last": {name: array.tolist() for name, array in result.last_params.items()},
            "best": result.best and [result.best.round, result.best.metric, result.best.value],
            "history": [*result.history],
            "stopped": result.stopped,
        }
        Path(f"worker-{os.environ.get('RANK', 'alone')}-{seed}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    script()
