"""What a module logged in training, as means over the passes and over the ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class LoggedMeans(Callback):
    """Averages what ``self.log`` was given, whether per step or per epoch, over a whole call to ``fit``.

    Lightning keeps a metric that is logged per step as its last value; here it is the mean over the steps in which it
    was logged, by the examples of each. One that is logged per epoch is the mean over the epochs. What a validation in
    the midst of training logs is left out.

    Args:
        examples: Says how many examples of a batch are this rank's, from the batch and its index.
    """

    def __init__(self, examples: Callable[[Any, int], int]) -> None:
        self._examples_of = examples
        self._last: dict[str, Tensor] = {}
        self._validated: dict[str, Tensor] = {}
        self._steps: dict[str, tuple[Tensor, int]] = {}
        self._epochs: dict[str, list[float]] = {}
        self._examples = 0
        self.means: dict[str, float] = {}
        """The means over all ranks, once training has ended."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds what the step logged; it stays on the device."""
        examples = self._examples_of(batch, batch_idx)
        self._examples += examples
        for name, value in trainer.callback_metrics.items():
            if self._is_known(name, value):
                continue
            self._last[name] = value
            total, count = self._steps.get(name, (torch.zeros_like(value), 0))
            self._steps[name] = total + value * examples, count + examples

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what is validation's, which Lightning keeps among the others."""
        new = {name: value for name, value in trainer.callback_metrics.items() if not self._is_known(name, value)}
        self._validated |= new

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the epoch before, whose last metrics come after all other hooks."""
        self._close_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the means."""
        self._close_epoch(trainer)
        own = {name: float(total) / count for name, (total, count) in self._steps.items() if count}
        own |= {name: sum(values) / len(values) for name, values in self._epochs.items()}
        own = {name: value for name, value in own.items() if not _is_fork(name, own)}
        self.means = over_ranks(trainer, own, self._examples)
        self._last.clear()
        self._steps.clear()
        self._validated.clear()

    def _close_epoch(self, trainer: Trainer) -> None:
        for name, value in trainer.callback_metrics.items():
            if not self._is_known(name, value):
                self._last[name] = value
                self._epochs.setdefault(name, []).append(float(value))

    def _is_known(self, name: str, value: Tensor) -> bool:
        """Tells whether the metric is one seen before, which Lightning keeps until there is a new one."""
        seen = (self._last.get(name), self._validated.get(name))
        return any(other is not None and other.data_ptr() == value.data_ptr() for other in seen)


def _is_fork(name: str, names: Mapping[str, float]) -> bool:
    """Tells whether a metric is one of the two that Lightning makes of one that is logged per step and per epoch."""
    return any(name.endswith(suffix) and name.removesuffix(suffix) in names for suffix in ("_step", "_epoch"))


def over_ranks(trainer: Trainer, means: dict[str, float], examples: int) -> dict[str, float]:
    """Returns the means over the examples of all ranks.

    Args:
        trainer: Joins the ranks, each of which calls this.
        means: This rank's.
        examples: Over how many of them.
    """
    if trainer.world_size == 1:
        return means
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for other in gather_json(trainer, {"means": means, "examples": examples}):
        for name, value in other["means"].items():
            totals[name] = totals.get(name, 0.0) + value * other["examples"]
            counts[name] = counts.get(name, 0) + other["examples"]
    return {name: total / counts[name] for name, total in totals.items() if counts[name]}


def gather_json(trainer: Trainer, content: Any) -> list[Any]:
    """Returns what each rank has given, in the order of the ranks."""
    device = trainer.strategy.root_device
    text = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(text)], device=device)
    lengths = [int(other) for other in _gather(trainer, length)]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    rows = _gather(trainer, padded)
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]


def _gather(trainer: Trainer, tensor: Tensor) -> list[Tensor]:
    # Not the strategy's all_gather, which calls what torch has deprecated.
    gathered = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(gathered, tensor)
    return gathered
