"""The sums of the workers' shares of a cohort become one sum, the same on every worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shoal.engines.accounts import client_error, told
from shoal.engines.cohort import CohortSum, Outcome

Summation = Callable[[Sequence[Any], Sequence[float]], list[float]]
"""Replaces arrays in place, and numbers, by their sums over the workers; returns those of the numbers."""

Summary = dict[str, Any]
"""What a sum holds beside numbers, as JSON: names, shapes and failures."""


def summary(summed: CohortSum) -> Summary:
    """Returns what the others must know of a worker's sum before the sums can be added."""
    return {
        "metrics": list(summed.metrics),
        "extras": {
            name: {leaf: list(array.shape) for leaf, array in tree.items()}
            for name, tree in summed.total.extras.items()
        },
        "failures": {str(client): told(error) for client, error in summed.failures.items()},
    }


def merged(summaries: Iterable[Summary]) -> Summary:
    """Returns what the summaries of all workers say together."""
    metrics: dict[str, None] = {}
    extras: dict[str, Any] = {}
    failures: dict[str, Any] = {}
    for one in summaries:
        metrics |= dict.fromkeys(one["metrics"])
        extras |= one["extras"]
        failures |= one["failures"]
    return {"metrics": list(metrics), "extras": dict(sorted(extras.items())), "failures": failures}


def merge(summed: CohortSum, together: Summary, cohort: Sequence[int], add_up: Summation) -> list[Outcome]:
    """Makes one worker's sum that of all workers.

    One sum over the workers carries everything: the updates, their weights, and each client's metrics, whose columns
    every worker fills in for its own clients and leaves at zero for the others'.

    Args:
        summed: The worker's own; changed in place.
        together: From :func:`merged`, the same on every worker.
        cohort: The clients of all workers, in the same order on every worker.
        add_up: Sums over the workers.

    Returns:
        What became of the other workers' clients.
    """
    total, own = summed.total, set(summed.examples) | set(summed.failures)
    total.expect(together["extras"])
    table = _table(summed, together["metrics"], cohort)
    numbers = add_up(total.arrays(), [total.clients, total.weight, *table.reshape(-1).tolist()])
    total.clients, total.weight = round(numbers[0]), numbers[1]
    _read(summed, np.array(numbers[2:]).reshape(table.shape), together["metrics"], cohort)
    for client, account in together["failures"].items():
        if int(client) not in own:
            summed.failures[int(client)] = client_error(account)
    others = (client for client in cohort if client not in own)
    return [(client, summed.failures.get(client)) for client in others]


def _table(summed: CohortSum, metrics: Sequence[str], cohort: Sequence[int]) -> np.ndarray:
    """Returns a row for each client: its examples, and for each metric whether it has it, and its value."""
    table = np.zeros((len(cohort), 1 + 2 * len(metrics)))
    places = {client: place for place, client in enumerate(cohort)}
    for client, examples in summed.examples.items():
        table[places[client], 0] = examples
    for index, name in enumerate(metrics):
        for client, value in summed.metrics.get(name, {}).items():
            table[places[client], 1 + 2 * index : 3 + 2 * index] = 1.0, value
    return table


def _read(summed: CohortSum, table: np.ndarray, metrics: Sequence[str], cohort: Sequence[int]) -> None:
    summed.examples = {client: row[0] for client, row in zip(cohort, table.tolist(), strict=True) if row[0]}
    columns: Mapping[str, int] = {name: 1 + 2 * index for index, name in enumerate(metrics)}
    summed.metrics = {
        name: {client: row[at + 1] for client, row in zip(cohort, table.tolist(), strict=True) if row[at]}
        for name, at in columns.items()
    }
