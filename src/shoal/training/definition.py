"""What a training is, before it runs: one frozen configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from shoal.data import Dataset
from shoal.description import describe
from shoal.errors import ConfigurationError
from shoal.learners.base import Learner
from shoal.randomness import check_seed
from shoal.runs import Criteria, check_trackers


class Settings(TypedDict, total=False):
    """The further fields of :class:`Training`, for the signature of ``train``."""

    evaluate_every: int
    metric: str | None
    target: float | None
    patience: int | None
    max_seconds: float | None
    scale_lr: bool
    log_every: int
    checkpoint_every: int | None
    keep_checkpoints: int
    tensorboard: bool | None
    trackers: Sequence[str]
    trace: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """A training at one site: who trains what, how, and until when.

    A file for ``shoal train`` is a Python file with a function ``training(...)`` that returns one.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    learner: Learner
    """Trains and evaluates the model, on its devices."""
    data: Any
    """What to train on: arrays, a torch data set, or one of shoal's."""
    epochs: int
    """Passes over the data, ≥ 1. The learner's own number of them, or of steps, is for federations."""
    evaluate: Any = None
    """Held-out data that the model is measured on; None for none."""
    seed: int = 0
    """Decides the first parameters, the batches and all other randomness; ≥ 0."""
    name: str = "training"
    """Heads the report."""
    evaluate_every: int = 1
    """Measure after every so many epochs, and always after the last."""
    metric: str | None = None
    """Chooses the best model; None: "accuracy" if it is measured, else "loss". Losses and errors count down."""
    target: float | None = None
    """Stop when the metric has reached this."""
    patience: int | None = None
    """Stop after so many epochs without a better metric: early stopping, at the same step on every rank."""
    max_seconds: float | None = None
    """Stop after the epoch in which this much time, resumed parts included, has passed."""
    scale_lr: bool = False
    """Multiply the learning rates with the number of devices and of accumulated batches (the linear rule)."""
    log_every: int = 50
    """Tell of the progress after every so many steps; each time waits for the devices."""
    checkpoint_every: int | None = None
    """Write a checkpoint after every so many steps too, and not only after each epoch."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints to keep, beside the best."""
    tensorboard: bool | None = None
    """Write TensorBoard events to the run folder; None: where ``tensorboardX`` is installed."""
    trackers: Sequence[str] = ()
    """Which of "mlflow" and "wandb" (Weights & Biases) follow the run as well; offline, unless their own environment
    variables say otherwise. They need a run folder."""
    trace: bool = False
    """Record a few steps of rank 0 with torch's profiler in ``trace/rank-0.json`` of the run folder, for Perfetto or
    chrome://tracing."""

    def __post_init__(self) -> None:
        for name in ("epochs", "evaluate_every", "patience", "log_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(f"{name} must be a whole number ≥ 1, not {value!r}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigurationError(f"max_seconds must be > 0, not {self.max_seconds}")
        if self.target is not None and not math.isfinite(self.target):
            raise ConfigurationError(f"target must be a number, not {self.target}")
        check_seed(self.seed)
        check_trackers(self.trackers)
        if isinstance(self.learner, type) or not isinstance(self.learner, Learner):
            raise ConfigurationError(f"learner must be a learner such as shoal.TorchLearner, not {self.learner!r}")
        asked = [name for name in ("metric", "target", "patience") if getattr(self, name) is not None]
        if asked and self.evaluate is None:
            raise ConfigurationError(f"{asked[0]} was given, but nothing is measured: pass evaluate=…")

    def criteria(self) -> Criteria:
        """Returns by what models are compared, and when the training stops."""
        return Criteria(
            limit=self.epochs,
            unit="epoch",
            metric=self.metric,
            target=self.target,
            patience=self.patience,
            max_seconds=self.max_seconds,
        )

    def options(self) -> dict[str, Any]:
        """Returns the settings that a resumed training may change, as JSON."""
        names = (
            "target",
            "patience",
            "max_seconds",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "tensorboard",
            "trackers",
        )
        return {name: describe(getattr(self, name)) for name in names} | {"trace": self.trace}

    def identity(
        self, data: Dataset, held_out: Dataset | None, *, effective_batch: int, lr_factor: float
    ) -> dict[str, Any]:
        """Returns the settings that decide the numbers, as JSON; a resumed training must have the same.

        How many devices there are is not among them, as long as a step has as many examples and the same rate.

        Args:
            data: What to train on.
            held_out: What to measure on; None for nothing.
            effective_batch: Examples in a step.
            lr_factor: What the learning rates are scaled with.
        """
        learner = self.learner.describe()
        for name in ("batch_size", "accumulate", "epochs", "steps"):
            learner.pop(name, None)
        return {
            **{name: describe(getattr(self, name)) for name in ("name", "seed", "epochs", "evaluate_every", "metric")},
            "effective_batch": effective_batch,
            "lr_factor": lr_factor,
            "learner": learner,
            "data": data.describe(),
            "evaluate": None if held_out is None else held_out.describe(),
        }
