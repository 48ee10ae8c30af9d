"""What every learner can do, whatever its framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from shoal.data import Dataset
from shoal.devices import Devices
from shoal.types import Broadcast, ModelState, Params, StackedUpdate, Update


@runtime_checkable
class Learner(Protocol):
    """Trains and evaluates a model on one client's data.

    A learner holds no algorithm: what a method wants of it arrives in the broadcast. It holds no client either:
    nothing of one call to :meth:`fit` is left for the next.
    """

    @property
    def devices(self) -> Devices:
        """Where the learner's model lives."""
        ...  # pragma: no cover

    def preload(self) -> None:
        """Imports and makes what training needs without touching a device; called before processes are forked.

        Raises:
            ConfigurationError: A process forked from this one cannot use the learner's devices.
        """
        ...  # pragma: no cover

    def init(self, seed: int) -> ModelState:
        """Returns the model before training, on the learner's devices; equal seeds give equal models."""
        ...  # pragma: no cover

    def fit(self, broadcast: Broadcast, data: Dataset, rng: np.random.Generator) -> Update:
        """Trains the broadcast's model on ``data`` and returns what changed.

        Args:
            broadcast: The model to start from and the local objective.
            data: The client's examples.
            rng: The only source of randomness: the order of the batches, and the seed of dropout and the like.
        """
        ...  # pragma: no cover

    def evaluate(self, model: ModelState, data: Dataset) -> dict[str, float]:
        """Returns means over ``data``, such as ``{"loss": 0.3, "accuracy": 0.9}``."""
        ...  # pragma: no cover

    def check(self, data: Dataset) -> None:
        """Tries one small batch and the labels' range, so that a misfit shows before anything is written.

        Raises:
            DataError: The data do not fit the model or the loss.
        """
        ...  # pragma: no cover

    def state_dict(self, model: ModelState) -> Params:
        """Returns the arrays by the framework's own names, ready for the user's model to load."""
        ...  # pragma: no cover

    def on(self, devices: Devices) -> Self:
        """Returns the same learner on other devices."""
        ...  # pragma: no cover

    def describe(self) -> dict[str, Any]:
        """Returns what decides the learner's numbers, as JSON."""
        ...  # pragma: no cover


class BlockTrainer(Protocol):
    """Trains several clients as one program."""

    @property
    def variants(self) -> tuple[str, ...]:
        """The ways in which a block can be run, the usual one first. One that turns out not to work is left out."""
        ...  # pragma: no cover

    @property
    def equal_variants(self) -> tuple[str, ...]:
        """Those of :attr:`variants` in which a client ends with the bits of the usual one; that comes first."""
        ...  # pragma: no cover

    @property
    def warming_up(self) -> bool:
        """Whether the last block took longer than another like it will, so that its time says nothing."""
        ...  # pragma: no cover

    @property
    def pads(self) -> bool:
        """Whether batches of unequal size are padded to one, rather than run one size after the other."""
        ...  # pragma: no cover

    @property
    def repeatable(self) -> bool:
        """Whether a client ends with the same bits in blocks of any size, as far as it was tried."""
        ...  # pragma: no cover

    def capacity(self) -> int:
        """Returns how many clients a block may have at most for its memory, as estimated; at least 1."""
        ...  # pragma: no cover

    def work(self, examples: int) -> int:
        """Returns how many samples a client with so many examples sees."""
        ...  # pragma: no cover

    def fit(
        self, broadcast: Broadcast, clients: Sequence[tuple[Dataset, np.random.Generator]], variant: str = ...
    ) -> StackedUpdate:
        """Trains one block; each client ends as :meth:`Learner.fit` would leave it, but for rounding.

        The update may be in memory that the next block will use: read it before.

        Raises:
            MemoryError: The block does not fit the device.
        """
        ...  # pragma: no cover

    def settle(self, variant: str) -> None:
        """Lets go of the memory that only blocks of other variants need; called when one is chosen."""
        ...  # pragma: no cover

    def synchronize(self) -> None:
        """Waits until the device has done what it was given."""
        ...  # pragma: no cover


@runtime_checkable
class StackableLearner(Learner, Protocol):
    """A learner that may be able to train several clients as one program."""

    def stacked(self, dataset: Dataset) -> BlockTrainer:
        """Returns what does so.

        Args:
            dataset: Some of its samples are tried.

        Raises:
            CannotStackError: That would not be exact, or the framework cannot do it; the message names the reason.
        """
        ...  # pragma: no cover
