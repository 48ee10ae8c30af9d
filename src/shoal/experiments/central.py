"""A federation's experiment as a training at one site, on the data of all clients."""

from __future__ import annotations

from shoal.data import Population
from shoal.federation import Experiment
from shoal.training import Training

EPOCHS = 10
"""Passes over the data where nothing was said."""


def centrally(experiment: Experiment, *, epochs: int | None = None) -> Training:
    """Returns the training of the experiment's learner on all of its clients' data together.

    Args:
        experiment: Of whose parts the learner, the data, the seed and what is measured count.
        epochs: Passes over the data; None for :data:`EPOCHS`.
    """
    clients = experiment.clients
    population = clients if isinstance(clients, Population) else Population.from_datasets(clients)
    return Training(
        learner=experiment.learner,
        data=population.dataset,
        epochs=epochs or EPOCHS,
        evaluate=experiment.evaluate,
        seed=experiment.seed,
        name=experiment.name,
        metric=None if experiment.evaluate is None else experiment.metric,
    )
