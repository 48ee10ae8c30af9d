"""One client's samples as Lightning's loaders read them: the same batches as any learner's, divided among the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from shoal.data import ArrayDataset, Dataset, Subset
from shoal.learners.batches import pieces


class Batches(TorchDataset[tuple[Tensor, Tensor]]):
    """A data set from which a loader takes a batch at once.

    Args:
        data: The samples.
    """

    def __init__(self, data: Dataset) -> None:
        self._data = data

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs, targets = self._data.take(np.asarray(indices))
        return torch.as_tensor(inputs), torch.as_tensor(targets)


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the batch; a loader's ``collate_fn`` where the data set has made the batch."""
    return batch


def loader(data: Dataset, batches: Sequence[np.ndarray], settings: Mapping[str, Any], seed: int = 0) -> DataLoader[Any]:
    """Returns a loader of given batches.

    Args:
        data: The samples.
        batches: The indices of each batch.
        settings: Further arguments of ``DataLoader``.
        seed: Seeds the loader's workers; torch's own generator is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(Batches(data), batch_sampler=batches, collate_fn=as_it_is, generator=generator, **settings)  # type: ignore[arg-type]  # any iterable of batches will do


class ClientSamples(LightningDataModule):
    """The batches of one call to ``fit``, in the order drawn for it.

    Args:
        data: The client's samples.
        settings: Further arguments of ``DataLoader``.
        seed: Seeds the loaders' workers.
    """

    def __init__(self, data: Dataset, settings: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        self.data = data
        self.passes: Sequence[Sequence[np.ndarray]] = ()
        """For each pass its batches of all ranks together, as indices of samples."""
        self.first_epoch = 0
        """Lightning's number of the first pass."""
        self._settings = settings
        self._seed = seed
        self.shares: list[tuple[int, float]] = []
        """For each batch of the pass: how many examples this rank has of it, and by what to multiply the gradient of
        their mean, so that the ranks' average is the mean over the batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of this rank for the pass that Lightning has come to."""
        trainer = cast("Trainer", self.trainer)  # there is one when Lightning calls
        ranks, rank = trainer.world_size, trainer.global_rank
        number = trainer.current_epoch - self.first_epoch
        own: list[np.ndarray] = []
        self.shares = []
        for batch in self.passes[number]:
            (piece,) = pieces(len(batch), batch_size=len(batch), ranks=ranks, rank=rank)
            mine = batch[piece.start : piece.start + piece.count]
            self.shares.append((piece.count, piece.share * ranks))
            own.append(mine if len(mine) else batch[:1])  # to compute with the others, for nothing
        return loader(self.data, own, self._settings, seed=self._seed + number * ranks + rank)

    def examples(self, batch: Any, index: int) -> int:
        """Returns how many examples of a batch of the pass are this rank's."""
        return self.shares[index][0]


class EqualExamples(Callback):
    """Lets each example weigh the same where a batch does not divide by the ranks, whose gradients are averaged.

    Args:
        samples: Knows the ranks' shares.
    """

    def __init__(self, samples: ClientSamples) -> None:
        self._samples = samples
        self._factor = 1.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes this rank's share of the batch."""
        _, self._factor = self._samples.shares[batch_idx]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Scales the gradient, and not the loss, which is logged."""
        if self._factor != 1.0:
            factor = self._factor
            loss.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]


def portable(data: Dataset) -> Dataset:
    """Returns the client's samples without the others of the same arrays, to be sent to another process."""
    if isinstance(data, Subset) and type(data.dataset) is ArrayDataset:
        return ArrayDataset(*data.take(np.arange(len(data))), classes=data.classes)
    return data
