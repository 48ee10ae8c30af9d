"""Who takes part in a round, and with which of its examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.data import Dataset, Population, split
from shoal.engines import ClientTask
from shoal.errors import ConfigurationError
from shoal.randomness import generator


def sample_cohort(population: int, size: int, *, seed: int, round: int) -> list[int]:
    """Returns the clients of a round, drawn uniformly without replacement, in ascending order.

    They depend on the arguments alone, never on the rounds before.

    Raises:
        ConfigurationError: The cohort is larger than the population.
    """
    if size > population:
        raise ConfigurationError(
            f"a cohort of {size} clients was asked for, but the population has {population}: use at most {population}"
        )
    drawn = generator(seed, "cohort", round=round).choice(population, size=size, replace=False, shuffle=False)
    return sorted(drawn.tolist())


class ClientShards:
    """Each client's examples, divided into a part to train on and a part to validate on.

    Args:
        population: The clients.
        validation: The share of each client's examples kept for validation. A client with a single example keeps it
            for training.
        seed: Decides which examples those are, for each client once and for all rounds.
    """

    def __init__(self, population: Population, *, validation: float, seed: int) -> None:
        self.population = population
        self._validation = validation
        self._seed = seed

    def tasks(self, cohort: Sequence[int], *, round: int) -> list[ClientTask]:
        """Returns the tasks of a round."""
        return [
            ClientTask(client=client, data=self.training(client), seed=self._seed, round=round) for client in cohort
        ]

    def training(self, client: int) -> Dataset:
        """Returns the examples that the client trains on."""
        return self._parts(client)[0]

    def validation(self, client: int) -> Dataset | None:
        """Returns the examples that the client is validated on; None where it has too few to spare one."""
        return self._parts(client)[1]

    def panel(self, size: int) -> list[int]:
        """Returns the clients to validate on: the same in every round, at most ``size`` of those that can."""
        order = generator(self._seed, "validation panel").permutation(len(self.population))
        able = order[self.population.sizes[order] > 1][:size]
        return sorted(np.asarray(able).tolist())

    def _parts(self, client: int) -> tuple[Dataset, Dataset | None]:
        data = self.population[client]
        if not self._validation or len(data) < 2:
            return data, None
        return split(data, self._validation, generator(self._seed, "validation", client=client))
