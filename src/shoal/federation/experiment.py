"""What a federation is, before it runs: one frozen configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from shoal.algorithms import Algorithm, FedAvg
from shoal.data import Population
from shoal.description import describe
from shoal.engines import Engine, SiteEngine
from shoal.errors import ConfigurationError
from shoal.learners.base import Learner
from shoal.randomness import check_seed
from shoal.runs import Criteria, check_trackers


class Settings(TypedDict, total=False):
    """The further fields of :class:`Experiment`, for the signature of ``federate``."""

    evaluate_every: int
    client_validation: float
    validation_clients: int
    metric: str | None
    target: float | None
    patience: int | None
    max_seconds: float | None
    max_failures: int
    checkpoint_every: int
    keep_checkpoints: int
    tensorboard: bool | None
    trackers: Sequence[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """A federation: who trains what, how, and until when.

    An experiment file for ``shoal federate`` is a Python file with a function ``experiment(...)`` that returns one.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    learner: Learner
    """Trains and evaluates the model on one client's data."""
    clients: Population | Sequence[Any]
    """The population; or one data set (arrays, a torch data set) for each client."""
    rounds: int
    """Number of rounds, ≥ 1."""
    cohort: int | None = None
    """Number of clients sampled for each round, without replacement; None for all of them."""
    algorithm: Algorithm = field(default_factory=FedAvg)
    """The federated method."""
    engine: str | Engine = "auto"
    """Where a cohort runs."""
    seed: int = 0
    """Decides the first parameters, the cohorts, the batches and all other randomness; ≥ 0."""
    name: str = "federation"
    """Heads the report."""
    evaluate: Any = None
    """Held-out data (arrays, a torch data set) that the global model is measured on; None for none."""
    evaluate_every: int = 1
    """Measure after every so many rounds, and always after the last."""
    client_validation: float = 0.0
    """The share of each client's examples kept from training, to measure the global model on; 0 for none."""
    validation_clients: int = 100
    """On how many clients' validation examples to measure, at most; they are drawn once for the run."""
    metric: str | None = None
    """Chooses the best model; None: "accuracy" if it is measured, else "loss". Losses and errors count down."""
    target: float | None = None
    """Stop when the metric has reached this."""
    patience: int | None = None
    """Stop after so many rounds without a better metric."""
    max_seconds: float | None = None
    """Stop after the round in which this much time, resumed parts included, has passed."""
    max_failures: int = 0
    """How many clients of a round may fail; they are left out with a warning. One more stops the run."""
    checkpoint_every: int = 1
    """Write a checkpoint after every so many rounds; after the last and after the best one is always written."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints to keep, beside the best."""
    tensorboard: bool | None = None
    """Write TensorBoard events to the run folder; None: where ``tensorboardX`` is installed."""
    trackers: Sequence[str] = ()
    """Which of "mlflow" and "wandb" (Weights & Biases) follow the run as well; offline, unless their own environment
    variables say otherwise. They need a run folder."""

    def __post_init__(self) -> None:
        for name in (
            "rounds",
            "cohort",
            "evaluate_every",
            "validation_clients",
            "patience",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be a whole number ≥ 1, not {value!r}")
        if self.max_failures < 0:
            raise ConfigurationError(f"max_failures must be a whole number ≥ 0, not {self.max_failures!r}")
        if not 0 <= self.client_validation < 1:
            raise ConfigurationError(f"client_validation must be a share in [0, 1), not {self.client_validation}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigurationError(f"max_seconds must be > 0, not {self.max_seconds}")
        if self.target is not None and not math.isfinite(self.target):
            raise ConfigurationError(f"target must be a number, not {self.target}")
        check_seed(self.seed)
        check_trackers(self.trackers)
        self._check_kinds()

    def _check_kinds(self) -> None:
        if isinstance(self.learner, type) or not isinstance(self.learner, Learner):
            raise ConfigurationError(f"learner must be a learner such as shoal.TorchLearner, not {self.learner!r}")
        strategy = self.learner.devices.strategy
        if strategy != "single":
            raise ConfigurationError(
                f"a federation's clients train on one device each, and the learner asks for strategy {strategy!r}: "
                "use Devices('single'), and `shoal federate --workers N` or torchrun for several devices; or a "
                "shoal.Job, whose sites have several each"
            )
        if isinstance(self.algorithm, type) or not isinstance(self.algorithm, Algorithm):
            raise ConfigurationError(f"algorithm must be one such as shoal.FedAvg(), not {self.algorithm!r}")
        by_sites = isinstance(self.engine, SiteEngine)
        measured = self.evaluate is not None or self.client_validation > 0 or by_sites
        asked = [name for name in ("metric", "target", "patience") if getattr(self, name) is not None]
        if asked and not measured:
            raise ConfigurationError(
                f"{asked[0]} was given, but nothing is measured: pass evaluate=… or client_validation=…"
            )

    def criteria(self) -> Criteria:
        """Returns by what models are compared, and when the run stops."""
        return Criteria(
            limit=self.rounds,
            unit="round",
            metric=self.metric,
            target=self.target,
            patience=self.patience,
            max_seconds=self.max_seconds,
        )

    def options(self) -> dict[str, Any]:
        """Returns the settings that a resumed run may change, as JSON."""
        names = (
            "rounds",
            "target",
            "patience",
            "max_seconds",
            "checkpoint_every",
            "keep_checkpoints",
            "tensorboard",
            "trackers",
        )
        return {name: describe(getattr(self, name)) for name in names}

    def identity(self, population: Population, evaluate: Any) -> dict[str, Any]:
        """Returns the settings that decide the numbers, as JSON; a resumed run must have the same."""
        names = (
            "name",
            "cohort",
            "seed",
            "evaluate_every",
            "client_validation",
            "validation_clients",
            "metric",
            "max_failures",
        )
        return {
            **{name: describe(getattr(self, name)) for name in names},
            "learner": self.learner.describe(),
            "algorithm": self.algorithm.describe(),
            "clients": population.describe(),
            "evaluate": describe(evaluate),
        }
