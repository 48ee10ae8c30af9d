"""Batches of a long training: read ahead by processes of their own, and copied to the device beside its work."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Generator, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from shoal.data import Dataset
from shoal.learners.torch_samples import ResidentSamples

AHEAD = 4
"""How many batches each process reads ahead."""

Pair = tuple[Tensor, Tensor]
"""Inputs and targets."""


def training_batches(
    samples: ResidentSamples,
    data: Dataset,
    order: np.ndarray,
    sizes: Sequence[int],
    *,
    workers: int,
    device: torch.device,
) -> Generator[Pair]:
    """Yields batches on the device.

    Args:
        samples: Brings what is not read ahead.
        data: What they are taken from.
        order: Which samples, in the order in which they are seen.
        sizes: How many each batch has.
        workers: Processes that read ahead; 0 for none.
        device: Where the model is.
    """
    if workers == 0:
        return samples.batches(data, order, sizes)
    parts = np.split(order, np.cumsum(sizes[:-1]))
    loader = DataLoader(
        _Batches(data, parts),
        batch_size=None,  # an item is a batch already
        shuffle=False,
        num_workers=workers,
        prefetch_factor=AHEAD,
        pin_memory=device.type == "cuda",
        worker_init_fn=_end_with_parent,
        generator=torch.Generator().manual_seed(0),  # the processes' seeds are not to be drawn from the caller's
    )
    return ahead(loader, device)


def _end_with_parent(_number: int) -> None:
    """Leaves Ctrl-C to the process that trains, and ends when that ends, however: its run folder is free then."""
    parent_death_signal = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(parent_death_signal, ctypes.c_ulong(signal.SIGKILL))


class _Batches(TorchDataset[Pair]):
    """Batches by their number.

    Args:
        data: What they are taken from.
        parts: Which samples each has.
    """

    def __init__(self, data: Dataset, parts: Sequence[np.ndarray]) -> None:
        self._data = data
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> Pair:
        inputs, targets = self._data.take(self._parts[number])
        return torch.as_tensor(inputs), torch.as_tensor(targets)


def ahead(batches: Iterable[Pair], device: torch.device) -> Generator[Pair]:
    """Yields batches on the device, each copied there while the one before it is worked on."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: Pair | None = None
    for inputs, targets in batches:
        with torch.cuda.stream(side):
            coming = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream(device).wait_stream(side)
        for tensor in coming:
            tensor.record_stream(torch.cuda.current_stream(device))
        waiting = coming
    if waiting is not None:
        yield waiting
