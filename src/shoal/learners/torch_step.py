"""One step of training, for one client as for many devices."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from shoal.errors import ConfigurationError
from shoal.learners.batches import Piece
from shoal.learners.torch_model import ObjectiveGradient
from shoal.learners.torch_tally import Tally

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner


class Steppable(Protocol):
    """A model as a step needs it."""

    @property
    def call(self) -> Callable[[Any], Any]:
        """Runs the model on a batch."""
        ...  # pragma: no cover

    @property
    def params(self) -> Mapping[str, nn.Parameter]:
        """What is trained."""
        ...  # pragma: no cover

    def drop_gradients(self) -> None:
        """Forgets the gradients."""
        ...  # pragma: no cover

    def syncing(self, *, last: bool) -> AbstractContextManager[object]:
        """Returns the context of one of the step's backward passes."""
        ...  # pragma: no cover


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one backward pass of a step computes."""

    inputs: Any
    """As the model takes them."""
    targets: Tensor
    """As the loss takes them."""
    factor: float = 1.0
    """What the loss is multiplied with, so that the step's gradient is that of the mean over all of its examples."""


class Stepper:
    """Takes steps: gradients, the local objective, clipping, the optimizer.

    It is also the closure that some of torch's optimizers call several times in one step (LBFGS).

    Args:
        learner: Gives the loss, the metrics, the precision and the largest norm.
        model: What is trained.
        optimizer: Over the model's parameters.
        objective: The gradient of the local objective's own terms.
        scaler: What scales the loss of fp16; None in other precisions.
    """

    def __init__(
        self,
        learner: TorchLearner,
        model: Steppable,
        optimizer: torch.optim.Optimizer,
        objective: ObjectiveGradient | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._learner = learner
        self._model = model
        self._optimizer = optimizer
        self._objective = objective
        self._scaler = scaler
        self._rates = [group["lr"] for group in optimizer.param_groups] if learner.schedule else []
        self._needs_closure = needs_closure(optimizer)
        if self._needs_closure and scaler is not None:
            raise ConfigurationError("fp16 scales the loss, which this optimizer's closure does not allow: use bf16")
        self._batches: Sequence[Batch] = ()
        self._means: list[dict[str, Tensor]] = []

    def set_rates(self, step: int, steps: int, steps_per_epoch: int) -> None:
        """Sets the optimizer's learning rates to the user's, times the factor of the learner's schedule if it has one.

        Args:
            step: The step that comes, counted from 0.
            steps: How many there are in all.
            steps_per_epoch: How many a pass over the data has.
        """
        if self._learner.schedule is None:
            return
        factor = self._learner.schedule(step, steps, steps_per_epoch)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def take_pieces(
        self, pieces: Sequence[Piece], batches: Sequence[tuple[Tensor, Tensor]], tally: Tally, *, ranks: int
    ) -> None:
        """Makes one step of this rank's pieces of it.

        Args:
            pieces: What this rank computes.
            batches: Their inputs and targets.
            tally: Takes the loss and the metrics of each, from before the step.
            ranks: How many ranks make the step together.
        """
        # The strategies take the mean over the ranks.
        parts = zip(batches, pieces, strict=True)
        taken = [self._learner.step_batch(batch, piece.share * ranks) for batch, piece in parts]
        for piece, means in zip(pieces, self.take(taken), strict=True):
            tally.add(means, piece.count)

    def take(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Makes one step; returns the loss and the metrics of each batch, from before it."""
        self._batches, self._means = batches, []
        if self._needs_closure:
            self._optimizer.step(self)  # type: ignore[arg-type]  # the stub's returns a float
        else:
            self()
            if self._scaler is None:
                self._optimizer.step()
            else:
                self._scaler.step(self._optimizer)  # not where a gradient overflowed
                self._scaler.update()
        return self._means

    def __call__(self) -> Tensor:
        """Makes the gradient; returns the loss, [] or summed over the batches."""
        self._model.drop_gradients()
        losses, first = [], not self._means
        for number, batch in enumerate(self._batches, 1):
            with self._model.syncing(last=number == len(self._batches)):
                losses.append(self._backward(batch, measured=first))
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        if self._objective is not None:
            self._objective.add()
        if self._learner.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.params.values(), self._learner.clip_norm)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _backward(self, batch: Batch, *, measured: bool) -> Tensor:
        learner = self._learner
        with learner.autocast():
            output = self._model.call(batch.inputs)
            loss = learner.loss(output, batch.targets)
        told = loss.detach()
        if batch.factor != 1:
            loss = loss * batch.factor
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]
        if measured:
            metrics = learner.measure(output, batch.targets) if learner.train_metrics else {}
            self._means.append({"loss": told, **metrics})
        return loss.detach()


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether an optimizer calls for the gradient itself."""
    return _needs_closure(cast("Hashable", type(optimizer)))


@cache
def _needs_closure(kind: Hashable) -> bool:
    closure = inspect.signature(cast("type[torch.optim.Optimizer]", kind).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty
