"""What every learner can do, whatever its framework."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from shoal.data import Dataset
from shoal.devices import Devices
from shoal.types import Broadcast, ModelState, Params, Update


@runtime_checkable
class Learner(Protocol):
    """Trains and evaluates a model on one client's data.

    A learner holds no algorithm: what a method wants of it arrives in the broadcast. It holds no client either:
    nothing of one call to :meth:`fit` is left for the next.
    """

    @property
    def devices(self) -> Devices:
        """Where the learner's model lives."""
        ...  # pragma: no cover

    def init(self, seed: int) -> ModelState:
        """Returns the model before training, on the learner's devices; equal seeds give equal models."""
        ...  # pragma: no cover

    def fit(self, broadcast: Broadcast, data: Dataset, rng: np.random.Generator) -> Update:
        """Trains the broadcast's model on ``data`` and returns what changed.

        Args:
            broadcast: The model to start from and the local objective.
            data: The client's examples.
            rng: The only source of randomness: the order of the batches, and the seed of dropout and the like.
        """
        ...  # pragma: no cover

    def evaluate(self, model: ModelState, data: Dataset) -> dict[str, float]:
        """Returns means over ``data``, such as ``{"loss": 0.3, "accuracy": 0.9}``."""
        ...  # pragma: no cover

    def check(self, data: Dataset) -> None:
        """Tries one small batch and the labels' range, so that a misfit shows before anything is written.

        Raises:
            DataError: The data do not fit the model or the loss.
        """
        ...  # pragma: no cover

    def state_dict(self, model: ModelState) -> Params:
        """Returns the arrays by the framework's own names, ready for the user's model to load."""
        ...  # pragma: no cover

    def on(self, devices: Devices) -> Self:
        """Returns the same learner on other devices."""
        ...  # pragma: no cover

    def describe(self) -> dict[str, Any]:
        """Returns what decides the learner's numbers, as JSON."""
        ...  # pragma: no cover
