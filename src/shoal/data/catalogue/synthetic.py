"""FedProx's synthetic data, whose heterogeneity has two knobs."""

from __future__ import annotations

import numpy as np

from shoal.data.dataset import ArrayDataset
from shoal.data.population import Population
from shoal.errors import ConfigurationError
from shoal.randomness import generator

LARGEST_CLIENT = 10_000
"""Sizes are lognormal with a heavy tail; one client of a million samples would be most of the work."""


def synthetic(
    alpha: float, beta: float, *, clients: int = 30, dimension: int = 60, classes: int = 10, seed: int = 0
) -> tuple[Population, ArrayDataset]:
    """Draws the data of FedProx's experiments, in which heterogeneity has two knobs.

    Li et al., *Federated Optimization in Heterogeneous Networks*, 2020, appendix C.1.

    Client k draws u ~ N(0, α), a model W, b ~ N(u, 1), a centre v ~ N(B, 1) with B ~ N(0, β), and inputs x ~ N(v, Σ)
    with Σ diagonal, Σ_jj = j^-1.2; the label is argmax(W x + b). α, β and 1 are variances. Sizes are
    lognormal(4, 2) + 50, capped at 10,000. A tenth of each client's samples is its share of the test data.

    Args:
        alpha: How much the clients' models differ, ≥ 0.
        beta: How much the clients' inputs differ, ≥ 0.
        clients: Number of clients.
        dimension: Number of features.
        classes: Number of classes.
        seed: Decides everything that is drawn.

    Returns:
        The clients with their training data, and the test data of all together: inputs float32 [n, dimension],
        targets int64 [n].
    """
    if not (alpha >= 0 and beta >= 0):
        raise ConfigurationError(f"alpha and beta are variances and must be ≥ 0, not {alpha} and {beta}")
    if clients < 1:
        raise ConfigurationError(f"clients must be ≥ 1, not {clients}")
    parts = [_client(alpha, beta, dimension, classes, generator(seed, "synthetic", client=k)) for k in range(clients)]
    training: list[tuple[np.ndarray, np.ndarray]] = []
    testing: list[tuple[np.ndarray, np.ndarray]] = []
    for inputs, targets in parts:
        held_out = len(targets) // 10
        testing.append((inputs[:held_out], targets[:held_out]))
        training.append((inputs[held_out:], targets[held_out:]))
    name = f"synthetic({alpha:g}, {beta:g})"
    pooled = ArrayDataset(*_joined(training), classes=classes, name=name)
    sizes = [len(targets) for _, targets in training]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    description = {"partition": {"name": name}, "seed": seed}
    population = Population(pooled, np.arange(len(pooled)), offsets, description=description)
    return population, ArrayDataset(*_joined(testing), classes=classes, name=name)


def _client(
    alpha: float, beta: float, dimension: int, classes: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    size = min(int(rng.lognormal(4, 2)) + 50, LARGEST_CLIENT)
    u = rng.normal(0, np.sqrt(alpha))
    weights = rng.normal(u, 1, (dimension, classes))
    bias = rng.normal(u, 1, classes)
    centre = rng.normal(rng.normal(0, np.sqrt(beta)), 1, dimension)
    deviations = np.arange(1, dimension + 1) ** -0.6  # the square roots of Σ's diagonal
    inputs = rng.normal(centre, deviations, (size, dimension))
    return inputs.astype(np.float32), (inputs @ weights + bias).argmax(axis=1)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = zip(*parts, strict=True)
    return np.concatenate(inputs), np.concatenate(targets)
