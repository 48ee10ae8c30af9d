"""What every learner can do, whatever its framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from shoal.data import Dataset
from shoal.devices import Devices
from shoal.types import Broadcast, ModelState, Params, StackedUpdate, Update


class ClientTrainer(Protocol):
    """Trains and evaluates for one client at a time.

    Where several ranks do so together, all of them call the same in one order with equal arguments, and each gets the
    whole result.
    """

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


@runtime_checkable
class Learner(ClientTrainer, Protocol):
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


@runtime_checkable
class RankedLearner(Learner, Protocol):
    """A learner that trains a client on all of its devices, which a launcher has started ranks for."""

    def together(self) -> AbstractContextManager[ClientTrainer]:
        """Opens the ranks, for as many calls as there will be: nothing of them is made anew from one to the next.

        Raises:
            ConfigurationError: The devices cannot be used, or not for this learner.
            WorkerError: The other ranks did not come.
        """
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


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How large a step of a training is."""

    per_device: int
    """Examples that a device computes at a time."""
    devices: int
    """How many devices there are."""
    accumulate: int
    """How many batches on each device make a step."""

    @property
    def effective(self) -> int:
        """Examples in a step."""
        return self.per_device * self.devices * self.accumulate


def never() -> bool:
    """Returns False."""
    return False


class OngoingTraining(Protocol):
    """A model in training on one site's devices, as one of its ranks sees it; all ranks call the same in one order."""

    @property
    def rank(self) -> int:
        """Which rank this is; rank 0 writes and speaks."""
        ...  # pragma: no cover

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        ...  # pragma: no cover

    @property
    def accelerator(self) -> str:
        """The kind of device that the model is on, such as "cpu" or "cuda"."""
        ...  # pragma: no cover

    @property
    def model_bytes(self) -> int:
        """The size of the whole model."""
        ...  # pragma: no cover

    @property
    def batching(self) -> Batching:
        """How large a step is."""
        ...  # pragma: no cover

    @property
    def step(self) -> int:
        """How many steps are done."""
        ...  # pragma: no cover

    @property
    def steps(self) -> int:
        """How many there are in all."""
        ...  # pragma: no cover

    @property
    def steps_per_epoch(self) -> int:
        """How many a pass over the data has."""
        ...  # pragma: no cover

    def advance(self, until: int, stop: Callable[[], bool] = never) -> tuple[dict[str, float], int]:
        """Takes steps, at most to the end of the epoch, and waits for the devices.

        Args:
            until: The number of steps to have done then, more than now.
            stop: Asked before each further step whether to leave it at that; with several ranks it must not say so.

        Returns:
            The loss and the metrics, as means over the examples of these steps on all ranks; how many examples.
        """
        ...  # pragma: no cover

    def evaluate(self, data: Dataset) -> dict[str, float]:
        """Returns means over ``data``, equal on all ranks."""
        ...  # pragma: no cover

    def confusion(self, data: Dataset) -> np.ndarray | None:
        """Returns how many examples of each class were taken for which, int64 [classes, classes]; None: no classes."""
        ...  # pragma: no cover

    def rates(self) -> list[float]:
        """Returns the learning rates of the optimizer's groups, as of the last step."""
        ...  # pragma: no cover

    def usage(self) -> list[tuple[float, float]]:
        """Returns each rank's peak memory in bytes, and the share of time that its device was busy; NaN: unknown."""
        ...  # pragma: no cover

    def recorded(self, path: Path) -> AbstractContextManager[None]:
        """Returns the context in which the framework's profiler records what this rank does, into a file of JSON."""
        ...  # pragma: no cover

    def agreed(self, seconds: float) -> float:
        """Returns what rank 0 says."""
        ...  # pragma: no cover

    def model(self) -> ModelState:
        """Returns copies of the whole model's arrays, on the CPU."""
        ...  # pragma: no cover

    def put(self, model: ModelState | None) -> None:
        """Replaces the model's arrays by those that rank 0 gives; the others give None."""
        ...  # pragma: no cover

    def state(self) -> tuple[Params, dict[str, Any]]:
        """Returns all that a crash must not lose, as arrays on the CPU and JSON; the arrays on rank 0 alone."""
        ...  # pragma: no cover

    def restore(self, tensors: Params | None, meta: Mapping[str, Any] | None) -> dict[str, Any]:
        """Goes on from a state.

        Args:
            tensors: As :meth:`state` gave them; None on ranks other than 0, and where there is no state.
            meta: Likewise, and further JSON.

        Returns:
            The JSON of rank 0; empty where there is no state.
        """
        ...  # pragma: no cover


@runtime_checkable
class CallingTraining(Protocol):
    """An ongoing training that calls its framework's own callbacks, and so must be told of epochs."""

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        """Told of each epoch once it was measured, on all ranks.

        Args:
            record: The means over training, with ``train_`` before their names, and those over held-out data.
        """
        ...  # pragma: no cover

    @property
    def stopping(self) -> bool:
        """Whether a callback wants no further epoch; the same on all ranks."""
        ...  # pragma: no cover

    def finish(self) -> None:
        """Told of the end of the training."""
        ...  # pragma: no cover


@runtime_checkable
class TrainableLearner(Learner, Protocol):
    """A learner that trains step by step, on all of its devices."""

    def training(
        self, data: Dataset, *, epochs: int, seed: int, scale_lr: bool = False
    ) -> AbstractContextManager[OngoingTraining]:
        """Begins a training on the ranks that were started for the learner's devices.

        Args:
            data: All examples.
            epochs: Passes over them.
            seed: Decides all randomness.
            scale_lr: Whether learning rates are multiplied with the effective batch by that of one device.

        Raises:
            ConfigurationError: The devices cannot be used, or not for this learner.
        """
        ...  # pragma: no cover
