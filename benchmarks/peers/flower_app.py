"""The clients of the Flower runs. A module of its own: Ray copies what the main script defines into every message."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from work import LEARNING_RATE, build, data

app = ClientApp()


@cache
def prepared(model: str, population: int, samples: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Makes the network and the data once in each actor, in a warm-up round, before anything is timed."""
    torch.set_num_threads(1)
    return build(model), data(model, population, samples)


def epoch(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int) -> None:
    """Trains a network in place."""
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), nn.CrossEntropyLoss()
    for batch, target in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
        optimizer.zero_grad()
        criterion(model(batch), target).backward()
        optimizer.step()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains one client as Flower's message API has it."""
    config: Any = message.content["config"]
    arrays: Any = message.content["arrays"]
    model, (inputs, labels) = prepared(config["model"], config["population"], config["samples"])
    client = int(context.node_config["partition-id"])
    model.load_state_dict(arrays.to_torch_state_dict())
    epoch(model, inputs[client], labels[client], config["batch-size"])
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(labels[client])}),
    }
    return Message(content=RecordDict(content), reply_to=message)


class Numpy(NumPyClient):
    """One client as Flower's older API has it."""

    def __init__(self, client: int) -> None:
        self.client = client

    def fit(self, parameters: Any, config: Any) -> tuple[list[Any], int, dict[str, Any]]:
        """Trains the client."""
        model, (inputs, labels) = prepared(config["model"], config["population"], config["samples"])
        names = model.state_dict().keys()
        model.load_state_dict({name: torch.from_numpy(array) for name, array in zip(names, parameters, strict=True)})
        epoch(model, inputs[self.client], labels[self.client], config["batch-size"])
        return [value.numpy() for value in model.state_dict().values()], len(labels[self.client]), {}


def client_fn(context: Context) -> Client:
    """Makes a client of the older API."""
    return Numpy(int(context.node_config["partition-id"])).to_client()
