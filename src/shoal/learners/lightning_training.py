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
from shoal.learners.torch_ranks import Ranks, explained
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
        ranks: The processes that a launcher has started, which all call this.
    """

    def __init__(
        self, learner: LightningLearner, data: Dataset, *, epochs: int, seed: int, devices: int, ranks: Ranks
    ) -> None:
        self._ranks = ranks
        self.rank = ranks.rank
        """Which rank this is."""
        self.ranks = ranks.count
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
            stop: Asked before each further epoch whether to leave it at that; with several ranks it must not say so.

        Returns:
            What the module logged in the last of them, and the number of examples in one.

        Raises:
            WorkerError: A rank is gone.
        """
        means: dict[str, float] = {}
        while self.step < until:
            rng = generator(self._seed, "fit", round=self.step + 1)
            with explained():
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
        """Returns what the module's validation step logs, as means over ``data``: rank 0's, lest the ranks disagree.

        Raises:
            DataError: There is no example.
            WorkerError: A rank is gone.
        """
        with explained():
            own = self._learner.evaluate(self._model, data)
        return dict(zip(own, self._ranks.from_leader(list(own.values())), strict=True))

    def confusion(self, data: Dataset) -> np.ndarray | None:
        """Returns None: what a module's output means is the module's own business."""
        return None

    def rates(self) -> list[float]:
        """Returns nothing: the optimizers live in Lightning's loop."""
        return []

    def usage(self) -> list[tuple[float, float]]:
        """Returns each process's peak memory in bytes, and nothing known of how busy the devices were.

        Raises:
            WorkerError: A rank is gone.
        """
        peak, _ = self._usage.read()
        return [(peak, math.nan) for [peak] in self._ranks.gather([peak])]

    def recorded(self, path: Path) -> AbstractContextManager[None]:
        """Refuses: the steps are in Lightning's loop, which has a profiler of its own.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError("trace=True records steps, which Lightning takes: use trainer={'profiler': 'pytorch'}")

    def agreed(self, seconds: float) -> float:
        """Returns what rank 0 says.

        Raises:
            WorkerError: A rank is gone.
        """
        return self._ranks.from_leader([seconds])[0]

    def model(self) -> ModelState:
        """Returns copies of the model's arrays."""
        model = self._model
        return ModelState(
            params=trees.copy(model.params), buffers=trees.copy(model.buffers), constants=trees.copy(model.constants)
        )

    def put(self, model: ModelState | None) -> None:
        """Replaces the model's arrays by those that rank 0 gives; the others give None."""
        shared, _ = self._ranks.share(None if model is None else _flat(model), {})
        if shared:
            self._model = _model(trees.unflatten(shared))

    def state(self) -> tuple[Params, dict[str, Any]]:
        """Returns all that a crash must not lose, as arrays and JSON; every rank has all of it."""
        tensors, meta = self._learner.carried()
        return _flat(self._model, tensors), {"step": self.step, CARRIED: meta}

    def restore(self, tensors: Params | None, meta: Mapping[str, Any] | None) -> dict[str, Any]:
        """Goes on from a state, which may have been written by another number of ranks.

        Args:
            tensors: As :meth:`state` gave them; None on ranks other than 0, and where there is no state.
            meta: Likewise, and further JSON.

        Returns:
            The JSON of rank 0; empty where there is no state.

        Raises:
            WorkerError: A rank is gone.
        """
        shared, told = self._ranks.share(tensors, meta)
        if not told:
            return {}
        parts = trees.unflatten(shared)
        self._model = _model(parts)
        self._learner.take_up(parts.get(CARRIED, {}), told[CARRIED])
        self.step = int(told["step"])
        return told


def _flat(model: ModelState, carried: Params | None = None) -> dict[str, Any]:
    """Returns all arrays in one flat tree."""
    parts = {"params": model.params, "buffers": model.buffers, "constants": model.constants, CARRIED: carried or {}}
    return trees.flatten(parts)


def _model(parts: Mapping[str, Params]) -> ModelState:
    """Returns the model in a tree that :func:`_flat` made."""
    return ModelState(**{name: parts.get(name, {}) for name in ("params", "buffers", "constants")})
