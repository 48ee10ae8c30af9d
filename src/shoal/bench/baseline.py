"""What shoal is measured against: the same rounds in the loop that one would write by hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATE = 0.1


class PlainLoop:
    """Federated averaging over one resident torch model, and nothing else.

    Args:
        model: Trained in place, on its device.
        inputs: All samples, on the device, [samples, …].
        targets: Their classes, [samples].
        clients: Each client's samples, indices [clients, samples of a client].
        batch_size: Samples in a batch.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, clients: Tensor, batch_size: int) -> None:
        self._model = model.train()
        self._params = list(model.parameters())
        self._inputs = inputs
        self._targets = targets
        self._clients = clients
        self._batch_size = batch_size

    def round(self, cohort: np.ndarray) -> None:
        """Trains each client of the cohort from the global model, and moves that by their mean."""
        start = [p.detach().clone() for p in self._params]
        total = [torch.zeros_like(p) for p in start]
        for client in cohort.tolist():
            with torch.no_grad():
                for p, first in zip(self._params, start, strict=True):
                    p.copy_(first)
            self._train(self._clients[client])
            with torch.no_grad():
                for p, first, added in zip(self._params, start, total, strict=True):
                    added.add_(p - first)
        with torch.no_grad():
            for p, first, added in zip(self._params, start, total, strict=True):
                p.copy_(first + added / len(cohort))

    def _train(self, samples: Tensor) -> None:
        optimizer = torch.optim.SGD(self._params, lr=LEARNING_RATE)
        order = samples[torch.randperm(len(samples), device=samples.device)]
        for batch in torch.split(order, self._batch_size):
            optimizer.zero_grad()
            F.cross_entropy(self._model(self._inputs[batch]), self._targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
