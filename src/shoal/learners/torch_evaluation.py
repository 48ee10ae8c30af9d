"""A model measured by all of its ranks together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shoal.data import Dataset
from shoal.errors import DataError
from shoal.learners.torch_devices import computing
from shoal.learners.torch_loading import training_batches
from shoal.learners.torch_model import seeded
from shoal.learners.torch_ranks import Ranks, explained
from shoal.learners.torch_strategies import SpreadModel
from shoal.learners.torch_tally import Tally, mean

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner


class RankedEvaluation:
    """Measures a spread model; all ranks call the same in one order, and all get the same.

    Args:
        learner: Gives the loss, the metrics and the size of a batch.
        model: What is measured.
        ranks: Those that have it.
    """

    def __init__(self, learner: TorchLearner, model: SpreadModel, ranks: Ranks) -> None:
        self._learner = learner
        self._model = model
        self._ranks = ranks

    def evaluate(self, data: Dataset) -> dict[str, float]:
        """Returns the loss and the metrics, as means over ``data``: the same bits on any number of ranks.

        The ranks take the batches in turn; none is computed twice for the mean.

        Raises:
            DataError: There is no example.
            WorkerError: A rank is gone.
        """
        tally = Tally()
        for output, targets, count in self._evaluated(data):
            means = {"loss": self._learner.loss(output, targets), **self._learner.measure(output, targets)}
            tally.add(means, count)
        values = tally.read()
        own = [*chain.from_iterable(values.values()), *map(float, tally.examples)]
        tables = [np.reshape(row, (len(values) + 1, -1)) for row in self._ranks.gather(own)]
        # The batches in their own order: the second of rank 0 comes after the first of the last rank.
        ordered: list[list[float]] = np.stack(tables).transpose(1, 2, 0).reshape(len(values) + 1, -1).tolist()
        *columns, counts = ordered
        examples = [int(count) for count in counts]
        return {name: mean(column, examples) for name, column in zip(values, columns, strict=True)}

    def confusion(self, data: Dataset) -> np.ndarray | None:
        """Returns how many examples of each class were taken for which, int64 [classes, classes]; None for no classes.

        Raises:
            WorkerError: A rank is gone.
        """
        total: Tensor | None = None
        for output, targets, count in self._evaluated(data):
            if not self._learner.classifies(output, targets) or output.ndim != 2:
                return None
            classes = output.shape[1]
            labels, taken = targets[:count].long(), output[:count].argmax(1)
            known = labels >= 0  # below are those that the loss leaves out
            found = torch.bincount((labels * classes + taken)[known], minlength=classes * classes)
            total = found if total is None else total + found
        if total is None:
            return None
        table: np.ndarray = np.sum(self._ranks.gather(total.double().tolist()), axis=0).astype(np.int64)
        side = math.isqrt(len(table))
        return table.reshape(side, side)

    def _evaluated(self, data: Dataset) -> Iterator[tuple[Any, Tensor, int]]:
        """Yields this rank's outputs and targets, as many batches as any rank has; of one too many 0 examples count."""
        if len(data) == 0:
            raise DataError("there is no example to evaluate on")
        self._model.align_buffers()
        learner, ranks = self._learner, self._ranks
        size = learner.eval_batch_size
        cuts = [np.arange(start, min(start + size, len(data))) for start in range(0, len(data), size)]
        own = range(ranks.rank, -(-len(cuts) // ranks.count) * ranks.count, ranks.count)
        picked = [cuts[number] if number < len(cuts) else cuts[0] for number in own]
        batches = training_batches(
            learner.samples,
            data,
            np.concatenate(picked),
            [len(cut) for cut in picked],
            workers=learner.workers,
            device=learner.device,
        )
        self._model.module.eval()
        with (
            seeded(learner.device, 0),
            torch.no_grad(),
            computing(learner.device, learner.devices.threads),
            learner.autocast(),
            explained(),
        ):
            for number, (inputs, targets) in zip(own, batches, strict=True):
                output = self._model.evaluate(learner.transformed(inputs))
                yield output, targets, len(targets) if number < len(cuts) else 0
