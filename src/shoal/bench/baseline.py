"""What shoal is measured against: the same rounds as one would write them by hand."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.bench.models import MODELS
from shoal.data import Dataset
from shoal.errors import ClientError

LEARNING_RATE = 0.1

SPAWNED = 3
"""Clients of a round that :class:`SpawnedClients` trains; each takes seconds, and all take as long."""

PATIENCE = 300.0
"""Seconds that a spawned client may take."""


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
        _train(self._model, self._inputs, self._targets, samples, self._batch_size)


class SpawnedClients:
    """A process for each client, started anew and gone after its epoch, so that the device's memory is given back.

    That is how hundreds of clients are put on one GPU where nothing better is at hand. A process costs the start of
    Python, torch and CUDA each time.

    Args:
        model: A name from :data:`~shoal.bench.MODELS`.
        device: Where it trains.
        data: All samples.
        clients: Each client's samples, indices [clients, samples of a client].
        batch_size: Samples in a batch.
    """

    def __init__(self, model: str, device: str, data: Dataset, clients: np.ndarray, batch_size: int) -> None:
        self._model = model
        self._device = device
        self._data = data
        self._clients = clients
        self._batch_size = batch_size
        self._params = [p.detach().numpy() for p in MODELS[model].make().parameters()]

    def round(self, cohort: np.ndarray) -> None:
        """Trains the first :data:`SPAWNED` clients of the cohort, and moves the global model by their mean."""
        trained = [self._in_a_process(self._clients[client]) for client in cohort[:SPAWNED].tolist()]
        self._params = [np.mean(parts, axis=0) for parts in zip(*trained, strict=True)]

    def _in_a_process(self, samples: np.ndarray) -> list[np.ndarray]:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        inputs, targets = self._data.take(samples)
        work = {"answer": theirs, "model": self._model, "device": self._device, "params": self._params}
        work |= {"inputs": inputs, "targets": targets, "batch_size": self._batch_size}
        child = spawn.Process(target=_spawned_client, kwargs=work, daemon=True)
        child.start()
        theirs.close()
        try:
            if not ours.poll(PATIENCE):
                raise ClientError(f"a spawned client took more than {PATIENCE:.0f} seconds")
            params: list[np.ndarray] = ours.recv()
            child.join(PATIENCE)
        except EOFError as error:
            raise ClientError("a spawned client ended without a result") from error
        finally:
            child.kill()
            child.join()
        return params


def _spawned_client(
    *,
    answer: Connection,
    model: str,
    device: str,
    params: list[np.ndarray],
    inputs: np.ndarray,
    targets: np.ndarray,
    batch_size: int,
) -> None:
    """Trains one client from the given parameters, in its own process, and sends back what they are then."""
    module = MODELS[model].make().to(device).train()
    with torch.no_grad():
        for p, given in zip(module.parameters(), params, strict=True):
            p.copy_(torch.from_numpy(given))
    samples = torch.arange(len(targets), device=device)
    _train(module, torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), samples, batch_size)
    answer.send([p.detach().cpu().numpy() for p in module.parameters()])


def _train(module: nn.Module, inputs: Tensor, targets: Tensor, samples: Tensor, batch_size: int) -> None:
    """Makes one epoch of SGD over some samples."""
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    order = samples[torch.randperm(len(samples), device=samples.device)]
    for batch in torch.split(order, batch_size):
        optimizer.zero_grad()
        F.cross_entropy(module(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
