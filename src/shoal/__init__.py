"""One training definition for one GPU, many GPUs, many machines, and many sites whose data cannot move.

Everything public is reached from here, and nothing is imported before it is used::

    import shoal

    learner = shoal.TorchLearner(Net, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1), batch_size=10)
    clients = shoal.data.partition(dataset, shoal.data.Dirichlet(clients=1000, alpha=0.3), seed=0)
    result = shoal.federate(learner, clients, rounds=200, cohort=100, evaluate=test_set, run_dir="runs/demo")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shoal.version import __version__

if TYPE_CHECKING:
    from shoal import data, engines, errors
    from shoal.algorithms import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
    from shoal.devices import Devices
    from shoal.federation import Callback, Experiment, FederationResult, Job, Progress, federate, run_experiment
    from shoal.learners.keras import KerasLearner
    from shoal.learners.lightning import LightningLearner
    from shoal.learners.schedules import WarmupCosine
    from shoal.learners.torch import TorchLearner, scale_pixels
    from shoal.runs import write_report
    from shoal.sites import Deadlines, Site
    from shoal.training import (
        Training,
        TrainingCallback,
        TrainingProgress,
        TrainingResult,
        run_training,
        train,
    )
    from shoal.types import Broadcast, LocalObjective, ModelState, Update

__all__ = [
    "Broadcast",
    "Callback",
    "Deadlines",
    "Devices",
    "Experiment",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "FederationResult",
    "Job",
    "KerasLearner",
    "LightningLearner",
    "LocalObjective",
    "ModelState",
    "Progress",
    "Site",
    "TorchLearner",
    "Training",
    "TrainingCallback",
    "TrainingProgress",
    "TrainingResult",
    "Update",
    "WarmupCosine",
    "__version__",
    "data",
    "engines",
    "errors",
    "federate",
    "run_experiment",
    "run_training",
    "scale_pixels",
    "train",
    "write_report",
]

_HOMES = {
    "shoal.algorithms": ("FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedProx", "FedYogi"),
    "shoal.devices": ("Devices",),
    "shoal.federation": ("Callback", "Experiment", "FederationResult", "Job", "Progress", "federate", "run_experiment"),
    "shoal.sites": ("Deadlines", "Site"),
    "shoal.learners.keras": ("KerasLearner",),
    "shoal.learners.lightning": ("LightningLearner",),
    "shoal.learners.torch": ("TorchLearner", "scale_pixels"),
    "shoal.learners.schedules": ("WarmupCosine",),
    "shoal.runs": ("write_report",),
    "shoal.training": (
        "Training",
        "TrainingCallback",
        "TrainingProgress",
        "TrainingResult",
        "run_training",
        "train",
    ),
    "shoal.types": ("Broadcast", "LocalObjective", "ModelState", "Update"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("data", "engines", "errors"):
        return importlib.import_module(f"shoal.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
