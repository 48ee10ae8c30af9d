"""What travels between the server and its clients: the model's state, the broadcast and the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A ``numpy.ndarray`` or a ``torch.Tensor`` on any device. Row 0 uses only what both have in common."""

Params: TypeAlias = Mapping[str, Array]
"""A flat tree of arrays by name; for torch the names of the state dict, tied weights once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelState:
    """All arrays of a model, by what a federation does with them."""

    params: Params
    """Parameters that clients train. The server optimizer moves them."""
    buffers: Params = field(default_factory=dict)
    """Floating-point statistics, such as BatchNorm's running mean. They are averaged, never optimized."""
    constants: Params = field(default_factory=dict)
    """Frozen parameters and integer buffers. They are sent and saved, and never change."""

    def merged(self) -> dict[str, Array]:
        """Returns all arrays in one flat tree."""
        return {**self.params, **self.buffers, **self.constants}


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalObjective:
    """What a client minimises beside its task loss.

    ``task loss + ⟨correction, w⟩ + (proximal / 2)·‖w − w_global‖²``, where w are the trained parameters and
    w_global those of the broadcast. FedProx, SCAFFOLD and FedDyn are values of this form.
    """

    proximal: float = 0.0
    """The strength μ of the proximal term, ≥ 0."""
    correction: Params | None = None
    """The linear term's coefficients, with the names and shapes of the trained parameters; None for zero."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Broadcast:
    """What the server sends to the cohort of one round."""

    round: int
    """The number of the round, counted from 1; 0 outside a federation."""
    model: ModelState
    """The global model."""
    objective: LocalObjective = field(default_factory=LocalObjective)
    """What to minimise beside the task loss."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """What one client sends back. Updates add: the server keeps one running sum."""

    delta: Params
    """Trained parameters after minus before. Learners take it in float64, where ``w + (w' − w)`` is w' again."""
    weight: float
    """Number of examples trained on, > 0."""
    buffers: Params = field(default_factory=dict)
    """The same difference for the model's buffers."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over the client's examples, such as ``{"loss": 0.3}``."""
    extras: Mapping[str, Params] = field(default_factory=dict)
    """Further trees that an algorithm asked for, by name; averaged like the delta."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StackedUpdate:
    """The updates of several clients that trained as one program, each array with the clients on its first axis."""

    delta: Params
    """Trained parameters after minus before, [clients, …], in the parameters' own dtype, because float64 would be
    twice the memory; zero where ``finite`` is false."""
    weights: np.ndarray
    """Number of examples of each client, shape [clients], > 0."""
    buffers: Params = field(default_factory=dict)
    """The same difference for the model's buffers."""
    metrics: Mapping[str, Array] = field(default_factory=dict)
    """Means over each client's examples, [clients] each; they may be on a device that is still computing them."""
    finite: Array
    """Whether a client's delta and buffers hold neither NaN nor infinity, [clients]; on the same device."""

    def row(self, index: int) -> Update:
        """Returns one client's update, whose arrays are cut out when they are asked for."""
        return Update(
            delta=_Row(self.delta, index),
            weight=float(self.weights[index]),
            buffers=_Row(self.buffers, index),
            metrics=_Row(self.metrics, index),
        )


class _Row(Mapping[str, Array]):
    """One client's part of a stacked tree."""

    __slots__ = ("_index", "_stacked")

    def __init__(self, stacked: Params, index: int) -> None:
        self._stacked = stacked
        self._index = index

    def __getitem__(self, name: str) -> Array:
        return self._stacked[name][self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stacked)

    def __len__(self) -> int:
        return len(self._stacked)
