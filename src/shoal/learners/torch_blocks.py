"""A block's batches: which client sees which samples in which step, and their way onto the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from shoal.data import Dataset
from shoal.learners.batches import draw_order
from shoal.learners.torch_samples import ResidentSamples, places


@dataclass(frozen=True, eq=False)
class Part:
    """Clients of a block that make one step together, on batches of one size."""

    starts: np.ndarray
    """Where each client's batch begins in its own order, shape [clients of the part]."""
    counts: np.ndarray
    """How many samples each batch really has, shape [clients of the part]."""
    rows: list[int] | None
    """Which clients of the block they are; None for all."""

    @cached_property
    def width(self) -> int:
        """The size of the batches, padding included."""
        return int(self.counts.max())

    @cached_property
    def padded(self) -> bool:
        """Whether there is padding."""
        return bool((self.counts < self.width).any())

    @cached_property
    def start(self) -> int | None:
        """Where the batches begin, if it is one place for all clients of the block, and no batch is padded."""
        same = self.rows is None and not self.padded and bool((self.starts == self.starts[0]).all())
        return int(self.starts[0]) if same else None

    def examples(self, device: torch.device) -> Tensor | int:
        """Returns how many samples each batch really has, float64 on the device, or one number for all."""
        if not self.padded:
            return self.width
        return torch.as_tensor(self.counts, dtype=torch.float64, device=device)


@dataclass(frozen=True, eq=False)
class Schedule:
    """All steps of a block."""

    steps: list[list[Part]]
    """The parts of each step."""
    examples: np.ndarray
    """How many samples each client has."""
    seen: np.ndarray
    """How many it sees, with repetition, float64."""
    ends: Mapping[int, list[int]] = field(default_factory=dict)
    """Which clients make their last step in a step; empty where all end together."""

    @property
    def shape(self) -> tuple[tuple[int, int], ...] | None:
        """Where the batches of each step begin and how large they are, if that is the same for all clients."""
        starts = [parts[0].start for parts in self.steps]
        if any(len(parts) > 1 for parts in self.steps) or None in starts:
            return None
        return tuple((start or 0, parts[0].width) for start, parts in zip(starts, self.steps, strict=True))

    def samples(self, device: torch.device) -> Tensor | float:
        """Returns how many samples each client sees, float64 on the device, or one number for all."""
        first = float(self.seen[0])
        return first if (self.seen == first).all() else torch.as_tensor(self.seen, device=device)


def schedule(sizes: Sequence[Sequence[int]], examples: Sequence[int], *, pads: bool) -> Schedule:
    """Returns how a block of clients goes through its steps.

    Args:
        sizes: The sizes of each client's batches; one list for clients of equal size.
        examples: How many samples each client has.
        pads: Whether unequal batches of a step are padded to one size; else each size is a part of its own.
    """
    if all(one is sizes[0] for one in sizes):
        seen = np.full(len(sizes), float(sum(sizes[0])))
        return Schedule(steps=_uniform(tuple(sizes[0]), len(sizes)), examples=np.asarray(examples), seen=seen)
    longest = max(len(one) for one in sizes)
    table = np.zeros((len(sizes), longest), dtype=np.int64)
    for row, one in enumerate(sizes):
        table[row, : len(one)] = one
    starts = np.cumsum(table, axis=1) - table
    ends: dict[int, list[int]] = {}
    if any(len(one) < longest for one in sizes):
        for row, one in enumerate(sizes):
            ends.setdefault(len(one) - 1, []).append(row)
    return Schedule(
        steps=[_parts(table[:, step], starts[:, step], pads=pads) for step in range(longest)],
        examples=np.asarray(examples),
        seen=table.sum(axis=1).astype(np.float64),
        ends=ends,
    )


@lru_cache(maxsize=64)  # blocks are many, and their shapes few
def _uniform(sizes: tuple[int, ...], clients: int) -> list[list[Part]]:
    """Returns the steps of so many clients that all have these batches."""
    starts = np.cumsum(sizes) - sizes
    return [
        [Part(np.full(clients, start), np.full(clients, size), None)] for start, size in zip(starts, sizes, strict=True)
    ]


def _parts(counts: np.ndarray, starts: np.ndarray, *, pads: bool) -> list[Part]:
    if pads or (counts == counts[0]).all():
        return [Part(starts, counts, None)]
    parts = []
    for size in np.unique(counts[counts > 0]):
        rows = np.flatnonzero(counts == size)
        parts.append(Part(starts[rows], counts[rows], rows.tolist()))
    return parts


class BlockData:
    """Brings the clients' samples to the device: from one resident copy of the data set if it fits, else by block.

    Args:
        device: Where the model is.
        samples: Has the resident copy.
    """

    def __init__(self, device: torch.device, samples: ResidentSamples) -> None:
        self._device = device
        self._samples = samples
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def load(self, clients: Sequence[tuple[Dataset, np.random.Generator]], plan: Schedule) -> Cutter:
        """Draws each client's order, and returns what cuts the batches.

        Args:
            clients: Their samples and generators.
            plan: The block's steps.
        """
        orders = [draw_order(len(data), int(total), rng) for (data, rng), total in zip(clients, plan.seen, strict=True)]
        datasets = [data for data, _ in clients]
        source = resident = self._samples.of(datasets)
        if source is not None:
            orders = [places(data, order) for data, order in zip(datasets, orders, strict=True)]
        else:
            source, orders = self._gathered(datasets, orders)
        return Cutter(*source, self._table(orders), resident=resident is not None)

    def _table(self, orders: Sequence[np.ndarray]) -> Tensor:
        """Returns the orders as one table, [clients, longest], each filled up with its first sample."""
        longest = max(len(order) for order in orders)
        if all(len(order) == longest for order in orders):
            return self._to_device(torch.from_numpy(np.stack(orders)))
        table = np.stack([np.pad(order, (0, longest - len(order)), constant_values=order[0]) for order in orders])
        return self._to_device(torch.from_numpy(table))

    def _gathered(
        self, datasets: Sequence[Dataset], orders: Sequence[np.ndarray]
    ) -> tuple[tuple[Tensor, Tensor], list[np.ndarray]]:
        """Reads the clients' samples, client after client, each in the order in which it sees them."""
        taken = [data.take(order) for data, order in zip(datasets, orders, strict=True)]
        inputs, targets = (np.concatenate(arrays) for arrays in zip(*taken, strict=True))
        ends = np.cumsum([len(order) for order in orders])
        spans = [np.arange(end - len(order), end) for end, order in zip(ends, orders, strict=True)]
        return (self._to_device(torch.from_numpy(inputs)), self._to_device(torch.from_numpy(targets))), spans

    def _to_device(self, array: Tensor) -> Tensor:
        """Copies to the device beside what it computes, and lets it wait for the copy, not the host."""
        if self._side is None:
            return array
        with torch.cuda.stream(self._side):
            moved = array.pin_memory().to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._side)
        moved.record_stream(current)
        return moved


class Cutter:
    """Cuts the batches of a block out of its samples.

    Args:
        inputs: Of many samples, [samples, …].
        targets: Of the same.
        table: The samples of each client in the order in which it sees them, [clients, samples].
        resident: Whether the samples stay on the device when the block is done.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, table: Tensor, *, resident: bool) -> None:
        self.sources = inputs, targets
        self.table = table
        self.resident = resident

    def on(self, table: Tensor) -> Cutter:
        """Returns what cuts the batches of another block out of the same samples."""
        return Cutter(*self.sources, table, resident=self.resident)

    def __call__(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the inputs [clients, n, …], targets [clients, n, …] and masks [clients, n] of a part."""
        clients, width = len(part.counts), part.width
        table = self.table
        if part.start is not None:
            picked = table[:, part.start : part.start + width].reshape(-1)
            masks = None
        else:
            place = np.arange(width)[None, :]
            real = place < part.counts[:, None]
            columns = torch.as_tensor(part.starts[:, None] + np.where(real, place, 0), device=table.device)
            columns = columns.clamp(max=table.shape[1] - 1)  # of clients that are done: anything will do
            rows = torch.arange(clients) if part.rows is None else torch.as_tensor(part.rows)
            picked = table[rows.to(table.device)[:, None], columns].reshape(-1)
            shares = real / np.maximum(part.counts, 1)[:, None]
            masks = torch.as_tensor(shares, device=table.device) if part.padded else None
        inputs, targets = (array.index_select(0, picked) for array in self.sources)
        return torch.unflatten(inputs, 0, (clients, width)), torch.unflatten(targets, 0, (clients, width)), masks
