"""Samples on the learner's device."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.data import ArrayDataset, Dataset, Subset
from shoal.learners.torch_devices import free_memory

RESIDENT_SHARE = 0.4
"""The share of a device's free memory that a data set may take to be kept there whole."""

KEPT = 2
"""How many data sets stay on the device: the one that is trained on, and the one that is evaluated on."""

INDEXABLE = frozenset("?bBhilqefd")
"""The numpy kinds that torch can pick samples of."""


class ResidentSamples:
    """Whole data sets on the device, if they are two arrays that fit; on a CPU these are the arrays themselves.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[tuple[ArrayDataset, tuple[Tensor, Tensor] | None]] = []  # the last used at the end

    def of(self, datasets: Sequence[Dataset]) -> tuple[Tensor, Tensor] | None:
        """Returns the inputs and targets that all of these are parts of; None if there are no such arrays."""
        base = _base(datasets[0])
        # Another class may read its samples in its own way.
        if type(base) is not ArrayDataset or any(_base(data) is not base for data in datasets[1:]):
            return None
        others = [pair for pair in self._kept if pair[0] is not base]
        if len(others) == len(self._kept):
            self._kept = others[-(KEPT - 1) :]  # before there is another, which may need the room
            others, arrays = self._kept, self._brought(base)
        else:
            arrays = next(arrays for kept, arrays in self._kept if kept is base)
        self._kept = [*others, (base, arrays)]
        return arrays

    def batches(self, data: Dataset, order: np.ndarray, sizes: Sequence[int]) -> Generator[tuple[Tensor, Tensor]]:
        """Yields batches of inputs and targets.

        Args:
            data: One client's samples.
            order: Which of them, in the order in which they are seen.
            sizes: How many each batch has.
        """
        whole = self.of([data])
        if whole is None:
            for part in np.split(order, np.cumsum(sizes[:-1])):
                inputs, targets = (torch.as_tensor(array).to(self._device) for array in data.take(part))
                yield inputs, targets
            return
        picked = torch.from_numpy(places(data, order)).to(self._device)
        for rows in torch.split(picked, list(sizes)):
            yield whole[0].index_select(0, rows), whole[1].index_select(0, rows)

    def _brought(self, base: ArrayDataset) -> tuple[Tensor, Tensor] | None:
        arrays = (base.inputs, base.targets())
        if any(isinstance(array, np.memmap) or not array.flags.writeable for array in arrays):
            return None  # read where it lies, in parts
        if any(array.dtype.char not in INDEXABLE for array in arrays):
            return None
        needed = sum(array.nbytes for array in arrays)
        if self._device.type == "cuda" and needed > RESIDENT_SHARE * free_memory(self._device):
            return None
        inputs, targets = (torch.from_numpy(array).to(self._device) for array in arrays)
        return inputs, targets


def places(data: Dataset, order: np.ndarray) -> np.ndarray:
    """Returns where samples of a client lie in the data set that it is a part of."""
    return data.indices[order] if isinstance(data, Subset) else order


def _base(data: Dataset) -> Dataset:
    return data.dataset if isinstance(data, Subset) else data
