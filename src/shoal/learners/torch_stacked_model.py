"""A learner's model, loss and metrics for several clients at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.learners.torch_model import BorrowedModule
from shoal.learners.torch_per_client import PerClient
from shoal.learners.torch_vmap import for_each_client

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner


class StackedModel:
    """Gives each client the means over its own batch.

    Args:
        learner: Gives the transform, the loss and the metrics.
        borrowed: The module. Its frozen parameters, and buffers that stay as they are, are one copy for all clients.
        layers: How layers run whose weights differ by client.
    """

    def __init__(self, learner: TorchLearner, borrowed: BorrowedModule, layers: PerClient) -> None:
        self._learner = learner
        self._borrowed = borrowed
        self._layers = layers

    def means(
        self, state: Mapping[str, Tensor], inputs: Tensor, targets: Tensor, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns each client's ``loss``, and its metrics if they are wanted, [clients] each.

        Args:
            state: Stacked parameters and buffers, [clients, …] each; the buffers are changed in place.
            inputs: [clients, n, …].
            targets: [clients, n, …].
            masks: For batches padded to n, each sample's share in its client's mean, [clients, n]; None for full
                batches.
        """

        def one(x: Tensor, y: Tensor, mask: Tensor | None, *arrays: Tensor) -> dict[str, Tensor]:
            with self._learner.autocast(), self._layers:
                output = self._borrowed.call(dict(zip(state, arrays, strict=True)), self._learner.transformed(x))
                if mask is None:
                    return batch_means(self._learner, output, y)
                values = sample_values(self._learner, output, y)
                return {name: (value * mask.to(value.dtype)).sum() for name, value in values.items()}

        return for_each_client(one, (inputs, targets, masks, *state.values()))


def batch_means(learner: TorchLearner, output: Any, targets: Tensor) -> dict[str, Tensor]:
    """Returns the loss of one training batch, and its metrics if they are wanted, as scalar tensors."""
    metrics = learner.measure(output, targets) if learner.train_metrics else {}
    return {"loss": learner.loss(output, targets), **metrics}


def sample_values(learner: TorchLearner, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Returns what :func:`batch_means` gives for each sample by itself, [n] each."""
    values = for_each_client(lambda o, t: batch_means(learner, o.unsqueeze(0), t.unsqueeze(0)), (output, targets))
    # vmap takes apart what autocast would have computed in 32 bits.
    return {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in values.items()}
