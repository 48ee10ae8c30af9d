"""One client's training, on one device or by several ranks."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from shoal.data import Dataset
from shoal.learners.batches import draw_order, part_of_rank
from shoal.learners.torch_loading import training_batches
from shoal.learners.torch_model import ObjectiveGradient, Placing
from shoal.learners.torch_ranks import Ranks
from shoal.learners.torch_step import Steppable, Stepper
from shoal.learners.torch_tally import Tally
from shoal.types import Broadcast

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner

LOSS_SCALE = 2.0**12
"""What fp16 multiplies the loss with at first: less than torch's own, because a client has few steps to come down from
a scale that is too large, each of which is lost."""


class ClientModel(Steppable, Placing, Protocol):
    """A model that a client trains."""


def train_client(
    learner: TorchLearner,
    model: ClientModel,
    broadcast: Broadcast,
    data: Dataset,
    rng: np.random.Generator,
    *,
    ranks: Ranks | None = None,
    devices: int = 1,
    workers: int = 0,
) -> Tally:
    """Trains a model that holds the broadcast's arrays, and returns the means over what this rank has seen.

    Args:
        learner: Says how.
        model: On this rank.
        broadcast: Has the local objective.
        data: All of the client's examples.
        rng: Draws their order; of the same state on every rank.
        ranks: Those that train together; None for this process alone.
        devices: How many devices each rank has.
        workers: Processes that read batches ahead.
    """
    ranks = ranks or Ranks()
    optimizer = learner.optimizer(list(model.params.values()))
    objective = ObjectiveGradient(broadcast, model, model.params)
    stepper = Stepper(learner, model, optimizer, objective, _scaler(learner))
    tally, every = Tally(), ranks.count * devices
    sizes = learner.batch_sizes(len(data), every)
    steps, order = part_of_rank(
        draw_order(len(data), sum(sizes), rng),
        sizes,
        batch_size=learner.batch_size and learner.batch_size * devices,
        ranks=ranks.count,
        rank=ranks.rank,
    )
    counts = [piece.computed for step in steps for piece in step]
    read = training_batches(learner.samples, data, order, counts, workers=workers, device=learner.device)
    per_epoch = learner.steps_per_epoch(len(data), every)
    with closing(read) as batches:  # what reads ahead ends with it, also where a step fails
        for number, pieces in enumerate(steps):
            stepper.set_rates(number, len(steps), per_epoch)
            stepper.take_pieces(pieces, [next(batches) for _ in pieces], tally, ranks=ranks.count)
    return tally


def _scaler(learner: TorchLearner) -> torch.amp.GradScaler | None:
    """Returns what scales the loss of fp16; None in other precisions."""
    if learner.devices.precision != "fp16":
        return None
    return torch.amp.GradScaler(learner.device.type, init_scale=LOSS_SCALE)
