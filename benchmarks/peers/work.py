"""The work that every system is given: models, data, the command line and the answer."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, fields
from importlib.metadata import version
from itertools import pairwise

import torch
from torch import Tensor, nn

SHAPES: dict[str, tuple[int, ...]] = {"logistic": (60,), "mlp": (784,), "lenet": (3, 32, 32)}
CLASSES = 10
LEARNING_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is computed; ``compare.py`` sets every field, the same for all systems.

    Attributes:
        model: A key of `SHAPES`.
        population: Number of clients.
        cohort: Clients that train in a round.
        samples: Samples of a client.
        batch_size: Samples in one SGD step.
        rounds: Rounds that are timed.
        warmup: Rounds before them that are not.
        cores: Cores that may be used.
    """

    model: str
    population: int
    cohort: int
    samples: int
    batch_size: int
    rounds: int
    warmup: int
    cores: int


def parse() -> Work:
    """Reads the work from the command line, where each field is an option that has to be given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=list(SHAPES), required=True)
    for field in fields(Work):
        if field.name != "model":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, required=True)
    return Work(**vars(parser.parse_args()))


def build(model: str) -> nn.Module:
    """Makes one of the three models, with the same first weights in every process."""
    torch.manual_seed(0)
    if model == "logistic":
        return nn.Linear(60, CLASSES)
    if model == "mlp":
        return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, CLASSES))
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )


def data(model: str, population: int, samples: int) -> tuple[Tensor, Tensor]:
    """Draws the data of all clients.

    Returns:
        float32 inputs of shape (population, samples, *SHAPES[model]) and int64 labels of shape (population, samples).
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(population, samples, *SHAPES[model], generator=generator)
    labels = torch.randint(CLASSES, (population, samples), generator=generator)
    return inputs, labels


def report(system: str, work: Work, ticks: list[float], packages: tuple[str, ...]) -> None:
    """Prints the one line of JSON that ``compare.py`` reads.

    Args:
        system: Name of the column.
        work: What was computed.
        ticks: Time in seconds at the end of each round, the warm-up rounds among them.
        packages: Installed packages whose versions are told.

    Raises:
        RuntimeError: When there are more or fewer ticks than rounds.
    """
    if len(ticks) != work.warmup + work.rounds:
        raise RuntimeError(f"{len(ticks)} rounds were run, not {work.warmup} + {work.rounds}")
    timed = ticks[work.warmup - 1 :]
    seconds = statistics.median(after - before for before, after in pairwise(timed))
    answer = {
        "system": system,
        "model": work.model,
        "seconds_per_round": seconds,
        "milliseconds_per_client": 1000 * seconds / work.cohort,
        "versions": {package: version(package) for package in packages},
    }
    print(json.dumps(answer), flush=True)
