"""A LightningModule in training at one site, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shoal import trees
from shoal.data import Dataset
from shoal.errors import ConfigurationError
from shoal.learners.base import Batching, never
from shoal.learners.torch_usage import Usage
from shoal.randomness import generator
from shoal.types import Broadcast, ModelState, Params

if TYPE_CHECKING:
    from shoal.learners.lightning import LightningLearner

CARRIED = "carried"


class LightningTraining:
    """A learner's training, of which an epoch is a step: Lightning's own loop takes those within.

    Args:
        learner: Trains one epoch in a call, and keeps the optimizer's state from one to the next.
        data: All examples.
        epochs: Passes over them.
        seed: Decides the first parameters, the order of the examples and the noise.
        devices: How many the trainer uses.
    """

    def __init__(self, learner: LightningLearner, data: Dataset, *, epochs: int, seed: int, devices: int) -> None:
        self.rank = 0
        """Which rank this is."""
        self.ranks = 1
        """How many processes call this; those that the trainer starts do not count."""
        self.batching = Batching(
            per_device=learner.batch_size or -(-len(data) // devices),
            devices=devices,
            accumulate=int(learner.trainer.get("accumulate_grad_batches", 1)),
        )
        self.step = 0
        """How many epochs are done."""
        self.steps = epochs
        """How many there are in all."""
        self.steps_per_epoch = 1
        """One: an epoch is a step."""
        self.accelerator = learner.devices.accelerator
        """The kind of device that was asked for."""
        self._learner = learner
        self._data = data
        self._seed = seed
        self._model = learner.init(seed)
        self.model_bytes = trees.nbytes(self._model.merged())
        """The size of the model."""
        self._usage = Usage(torch.device("cpu"))

    def advance(self, until: int, stop: Callable[[], bool] = never) -> tuple[dict[str, float], int]:
        """Trains epochs.

        Args:
            until: The number of epochs to have done then, more than now.
            stop: Asked before each further epoch whether to leave it at that.

        Returns:
            What the module logged in the last of them, and the number of examples in one.
        """
        means: dict[str, float] = {}
        while self.step < until:
            rng = generator(self._seed, "fit", round=self.step + 1)
            update = self._learner.fit(Broadcast(round=0, model=self._model), self._data, rng)
            self._model = ModelState(
                params=trees.advance(self._model.params, update.delta),
                buffers=trees.advance(self._model.buffers, update.buffers),
                constants=self._model.constants,
            )
            means = dict(update.metrics)
            self.step += 1
            if stop():
                break
        self._usage.look()
        return means, len(self._data)

    def evaluate(self, data: Dataset) -> dict[str, float]:
        """Returns what the module's validation step logs, as means over ``data``."""
        return self._learner.evaluate(self._model, data)

    def confusion(self, data: Dataset) -> np.ndarray | None:
        """Returns None: what a module's output means is the module's own business."""
        return None

    def rates(self) -> list[float]:
        """Returns nothing: the optimizers live in Lightning's loop."""
        return []

    def usage(self) -> list[tuple[float, float]]:
        """Returns this process's peak memory in bytes, and nothing known of how busy the devices were."""
        peak, _ = self._usage.read()
        return [(peak, math.nan)]

    def recorded(self, path: Path) -> AbstractContextManager[None]:
        """Refuses: the steps are in Lightning's loop, which has a profiler of its own.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError("trace=True records steps, which Lightning takes: use trainer={'profiler': 'pytorch'}")

    def agreed(self, seconds: float) -> float:
        """Returns what was given."""
        return seconds

    def model(self) -> ModelState:
        """Returns copies of the model's arrays."""
        model = self._model
        return ModelState(
            params=trees.copy(model.params), buffers=trees.copy(model.buffers), constants=trees.copy(model.constants)
        )

    def put(self, model: ModelState | None) -> None:
        """Replaces the model's arrays; None leaves them as they are."""
        if model is not None:
            self._model = model

    def state(self) -> tuple[Params, dict[str, Any]]:
        """Returns all that a crash must not lose, as arrays and JSON."""
        tensors, meta = self._learner.carried()
        model = self._model
        parts = {"params": model.params, "buffers": model.buffers, "constants": model.constants, CARRIED: tensors}
        return trees.flatten(parts), {"step": self.step, CARRIED: meta}

    def restore(self, tensors: Params | None, meta: Mapping[str, Any] | None) -> dict[str, Any]:
        """Goes on from a state.

        Returns:
            The JSON; empty where there is no state.
        """
        if tensors is None or meta is None:
            return {}
        parts = trees.unflatten(tensors)
        names = ("params", "buffers", "constants")
        self._model = ModelState(**{name: parts.get(name, {}) for name in names})
        self._learner.take_up(parts.get(CARRIED, {}), meta[CARRIED])
        self.step = int(meta["step"])
        return dict(meta)
