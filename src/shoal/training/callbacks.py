"""What a user can hang into a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.devices import Devices

if TYPE_CHECKING:
    from shoal.training.result import TrainingResult

Record = Mapping[str, Any]
"""What is known of one epoch: the object that becomes its line in ``metrics.jsonl``."""


@dataclass(frozen=True, kw_only=True)
class TrainingInfo:
    """A training as its callbacks see it at the start."""

    name: str
    """The training's name."""
    epochs: int
    """Passes over the data."""
    steps: int
    """Steps in all."""
    first_step: int
    """How many of them were done before; above 0 after a resume."""
    examples: int
    """How many there are to train on."""
    devices: Devices
    """How the model is spread."""
    per_device: int
    """Examples that a device computes at a time."""
    device_count: int
    """How many devices there are."""
    accumulate: int
    """How many batches on each device make a step."""
    rates: tuple[float, ...]
    """The optimizer's learning rates before any schedule, scaled if they are to be."""
    base_rates: tuple[float, ...]
    """The same as the user gave them."""
    run_dir: Path | None
    """The run's folder."""
    notices: tuple[str, ...]
    """One line each, such as what was found at a resume."""


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """Some steps of a training."""

    step: int
    """How many steps are done in all."""
    epoch: int
    """In which epoch, from 1."""
    means: Mapping[str, float]
    """The loss and the metrics over these steps' examples, on all ranks."""
    samples_per_second: float
    """Of all devices together, measured when they had done them."""


class TrainingCallback:
    """Does nothing; override what you need. Only rank 0 calls it."""

    def on_train_start(self, training: TrainingInfo) -> None:
        """Called once, before the first step."""

    def on_steps(self, progressed: Progressed) -> None:
        """Called after every ``log_every`` steps and at the end of each epoch."""

    def on_epoch_end(self, record: Record) -> None:
        """Called after each epoch, when it has been measured."""

    def on_train_end(self, result: TrainingResult) -> None:
        """Called once, after everything is written."""

    def close(self) -> None:
        """Called at the very end, also after an error or Ctrl-C."""
