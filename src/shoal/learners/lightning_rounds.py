"""One Trainer of the user's that fits round after round: its limits, checkpoints and optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from shoal.learners.lightning_carrier import Carried, carried_state, take_up


@dataclass(frozen=True)
class Limits:
    """After how many epochs and optimizer steps a call to ``fit`` ends, as a Trainer has them."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """Returns a trainer's own."""
        return cls(trainer.max_epochs, trainer.min_epochs, trainer.max_steps, trainer.min_steps)

    def put(self, trainer: Trainer) -> None:
        """Makes them the trainer's."""
        loop = trainer.fit_loop
        loop.max_epochs, loop.min_epochs = self.max_epochs, self.min_epochs
        loop.epoch_loop.max_steps, loop.epoch_loop.min_steps = self.max_steps, self.min_steps

    def times(self, rounds: int) -> Limits:
        """Returns the limits of so many calls together."""
        return self._changed(lambda limit: limit * rounds, lambda limit: limit * rounds)

    def after(self, epochs: int, steps: int) -> Limits:
        """Returns the limits of a call by a trainer whose counters go on from there."""
        return self._changed(lambda limit: epochs + limit, lambda limit: steps + limit)

    def _changed(self, of_epochs: Any, of_steps: Any) -> Limits:
        return Limits(
            max_epochs=self.max_epochs if self.max_epochs in (None, -1) else of_epochs(self.max_epochs),
            min_epochs=of_epochs(self.min_epochs) if self.min_epochs else self.min_epochs,
            max_steps=self.max_steps if self.max_steps == -1 else of_steps(self.max_steps),
            min_steps=of_steps(self.min_steps) if self.min_steps else self.min_steps,
        )


class Rounds(Callback):
    """Lets each call to ``fit`` be one round of many.

    The trainer's limits are each call's. Its counters of epochs and steps go on, so that loggers, samplers and
    schedules do; where optimizers are kept, ``configure_optimizers`` sees the limits of all rounds together, for the
    schedules that ask how long training will be. Checkpoints of a round have a folder of their own, and the best and
    the last are among those; ``EarlyStopping`` begins anew.

    Args:
        trainer: Before its first round.
        keep_optimizer: Whether the state of optimizers, schedulers and fp16's scaler goes on, too, or begins anew.
    """

    def __init__(self, trainer: Trainer, *, keep_optimizer: bool) -> None:
        self._keep = keep_optimizer
        self._carried: Carried | None = None
        self._precision = deepcopy(trainer.precision_plugin.state_dict())
        self._homes: dict[int, tuple[ModelCheckpoint, Path]] = {}
        self._limits = Limits.of(trainer)
        self._rounds = 1
        self._folder = Path()

    @contextmanager
    def next(self, trainer: Trainer, *, rounds: int, folder: Path) -> Iterator[None]:
        """Makes a call to ``fit`` within the block a round.

        Args:
            trainer: The same each time.
            rounds: How many there will be.
            folder: Where in its own folder each ``ModelCheckpoint`` is to put the round's.
        """
        limits = Limits.of(trainer)
        self._rounds, self._folder = rounds, folder
        try:
            yield
        finally:
            limits.put(trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepares for what a strategy does before training: to make the optimizers, above all."""
        self._limits = Limits.of(trainer)
        if self._keep:
            self._limits.times(self._rounds).put(trainer)
        self._enter_folder(trainer)
        for callback in trainer.early_stopping_callbacks:
            _begin_anew(callback)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets this call end after as many epochs and steps as the trainer's own limits say."""
        self._limits.after(trainer.current_epoch, trainer.global_step).put(trainer)
        self._enter_folder(trainer)  # those that had no folder before have found one now
        for checkpoint in _model_checkpoints(trainer):
            _forget(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the optimizers' state in place."""
        if self._carried is not None:
            take_up(trainer, self._carried)
            self._carried = None
        elif self._precision:
            trainer.precision_plugin.load_state_dict(deepcopy(self._precision))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the optimizers' state, if it is to be kept."""
        if self._keep:
            self._carried = carried_state(trainer)

    def _enter_folder(self, trainer: Trainer) -> None:
        for checkpoint in _model_checkpoints(trainer):
            if checkpoint.dirpath is None:
                continue
            # With the callback itself, so that no other comes to have its number.
            known = self._homes.setdefault(id(checkpoint), (checkpoint, Path(checkpoint.dirpath)))
            checkpoint.dirpath = str(known[1] / self._folder)


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)


def _forget(checkpoint: ModelCheckpoint) -> None:
    """Lets a callback start without the checkpoints that it has written; those stay."""
    nothing: dict[str, Any] = {
        "best_model_score": None,
        "best_model_path": "",
        "best_k_models": {},
        "kth_best_model_path": "",
        "kth_value": _worst(checkpoint.mode),
        "last_model_path": "",
    }
    checkpoint.load_state_dict({**checkpoint.state_dict(), **nothing})
    checkpoint.current_score = None
    checkpoint._last_checkpoint_saved = ""  # noqa: SLF001 - or save_last="link" would link to another round's


def _begin_anew(callback: Any) -> None:
    stopping = cast("EarlyStopping", callback)
    state = {"wait_count": 0, "stopped_epoch": 0, "best_score": _worst(stopping.mode), "patience": stopping.patience}
    stopping.load_state_dict(state)
