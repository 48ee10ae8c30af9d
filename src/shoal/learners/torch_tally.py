"""Means over examples, from means over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from shoal.learners.torch_ranks import Ranks


class Tally:
    """Means over examples; batch by batch they stay on the device, and each is read from it once, at the end."""

    def __init__(self) -> None:
        self._means: dict[str, list[Tensor]] = {}
        self._examples: list[int] = []

    def add(self, means: Mapping[str, Tensor], examples: int) -> None:
        """Takes the means over a batch of so many examples."""
        for name, mean in means.items():
            self._means.setdefault(name, []).append(mean.detach())
        self._examples.append(examples)

    @property
    def examples(self) -> list[int]:
        """How many examples each batch had."""
        return self._examples

    def read(self) -> dict[str, list[float]]:
        """Waits for the device, and returns the means over each batch."""
        return {name: torch.stack(means).flatten().tolist() for name, means in self._means.items()}

    def means(self) -> dict[str, float]:
        """Waits for the device, and returns the means over all examples."""
        return {name: mean(values, self._examples) for name, values in self.read().items()}

    def over_ranks(self, ranks: Ranks) -> tuple[dict[str, float], int]:
        """Waits for the device, and returns the means over the examples of all ranks, and how many these are.

        Raises:
            WorkerError: A rank is gone.
        """
        values, examples = self.read(), self._examples
        own = [mean(each, examples) if sum(examples) else 0.0 for each in values.values()]
        rows = ranks.gather([*own, float(sum(examples))])
        counts = [int(row[-1]) for row in rows]
        return {name: mean([row[index] for row in rows], counts) for index, name in enumerate(values)}, sum(counts)


def mean(values: Iterable[float], examples: Sequence[int]) -> float:
    """Returns the mean over all examples, from the means over batches; their order makes no difference.

    A batch of no examples has no part in it, whatever its mean.
    """
    return math.fsum(value * count for value, count in zip(values, examples, strict=True) if count) / sum(examples)
