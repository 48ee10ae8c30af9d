"""A client's training and evaluation by the ranks of a site, which stay from one to the next."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import numpy as np

from shoal.data import Dataset
from shoal.learners.batches import check_divisible, draw_seed
from shoal.learners.torch_client import train_client
from shoal.learners.torch_devices import computing, process_devices
from shoal.learners.torch_evaluation import RankedEvaluation
from shoal.learners.torch_model import reseed, seeded
from shoal.learners.torch_ranks import Ranks, explained
from shoal.learners.torch_strategies import spread
from shoal.randomness import further_seed
from shoal.types import Broadcast, ModelState, Update

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner


class RankedTrainer:
    """A learner's model on all of its devices, as one of its ranks sees it; all ranks call the same in one order.

    What it computes is what the learner computes on one device with batches as large as those of all devices together,
    but for rounding. A BatchNorm sees each rank's part of a batch by itself, and noise is each rank's own.

    Args:
        learner: Says what to train and how; its own module becomes the spread one.
        ranks: Those that train together.

    Raises:
        ConfigurationError: The devices or the optimizer cannot do it.
    """

    def __init__(self, learner: TorchLearner, ranks: Ranks) -> None:
        self._learner = learner
        self._ranks = ranks
        self._devices = process_devices(learner.devices)
        self._model = spread(learner, ranks)
        self._evaluation = RankedEvaluation(learner, self._model, ranks)

    def fit(self, broadcast: Broadcast, data: Dataset, rng: np.random.Generator) -> Update:
        """Trains the broadcast's model on ``data`` and returns what changed, whole and on the CPU, on every rank.

        Args:
            broadcast: The model to start from and the local objective.
            data: All of the client's examples, of which each rank takes its part; at least one for each device.
            rng: Seeds torch (dropout and the like) and then draws the order; of the same state on every rank.

        Raises:
            DataError: There are fewer examples than devices.
            WorkerError: A rank is gone.
        """
        learner, ranks, model = self._learner, self._ranks, self._model
        check_divisible(len(data), ranks.count * len(self._devices))
        model.load(broadcast.model)
        model.module.train()
        quietly = seeded(learner.device, 0, *self._devices[1:])
        with quietly, computing(learner.device, learner.devices.threads), explained():
            reseed(self._devices, further_seed(draw_seed(rng), "noise", client=ranks.rank))
            tally = train_client(
                learner, model, broadcast, data, rng, ranks=ranks, devices=len(self._devices), workers=learner.workers
            )
            means, _ = tally.over_ranks(ranks)
            delta, buffers = model.delta(broadcast.model)
        return Update(delta=delta, buffers=buffers, weight=float(len(data)), metrics=means)

    def evaluate(self, model: ModelState, data: Dataset) -> dict[str, float]:
        """Returns the loss and the metrics, as means over ``data``: the same bits on any number of ranks.

        Raises:
            DataError: There is no example.
            WorkerError: A rank is gone.
        """
        self._model.load(model)
        return self._evaluation.evaluate(data)

    def close(self) -> None:
        """Lets go of the spread model, which must not outlive the ranks' group."""
        self._model.close()
        del self._model, self._evaluation
        gc.collect()  # torch's wrappers refer to themselves
