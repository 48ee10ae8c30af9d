"""Memory that a block leaves to the next: to ask the system for it anew in each step takes longer than to fill it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Pool:
    """Tensors of one device that wait to be used again.

    Args:
        device: Where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}
        self._lent: list[Tensor] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a contiguous tensor that holds anything; it is the caller's alone."""
        idle = self._idle.get((tuple(shape), dtype))
        return idle.pop() if idle else torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a tensor as :meth:`take` does, which comes back with the next :meth:`keep`."""
        self._lent.append(self.take(shape, dtype))
        return self._lent[-1]

    def give(self, tensor: Tensor) -> None:
        """Takes a tensor that nobody reads any more."""
        if tensor.is_contiguous():
            self._idle.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)

    def keep(self, clients: int) -> None:
        """Takes back what was lent, and lets go of what blocks of another size left."""
        for tensor in self._lent:
            self.give(tensor)
        self._lent.clear()
        self._idle = {key: idle for key, idle in self._idle.items() if key[0][:1] == (clients,)}
