"""Dividing one data set among clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.data.dataset import ArrayDataset, Dataset, as_dataset
from shoal.data.population import Population
from shoal.description import dataclass_fields
from shoal.errors import ConfigurationError, DataError
from shoal.randomness import generator


@dataclass(frozen=True, kw_only=True)
class Partitioner(ABC):
    """A rule that gives every sample to exactly one client."""

    clients: int
    """Number of clients, ≥ 1."""
    min_size: int = 1
    """The fewest samples that a client may have, ≥ 1; refused where there are not enough."""

    def __post_init__(self) -> None:
        for name in ("clients", "min_size"):
            self._require(name, getattr(self, name) >= 1, "≥ 1")

    @abstractmethod
    def owners(self, dataset: Dataset, rng: np.random.Generator) -> np.ndarray:
        """Returns the client of each sample, integers of shape [samples]."""

    def _require(self, name: str, holds: bool, bound: str) -> None:
        if not holds:
            raise ConfigurationError(f"{type(self).__name__}: {name} must be {bound}, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class IID(Partitioner):
    """Every client has a random sample of the whole; sizes differ by one at most."""

    def owners(self, dataset: Dataset, rng: np.random.Generator) -> np.ndarray:
        """Deals the samples out in random order."""
        return rng.permutation(len(dataset)) % self.clients


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partitioner):
    """Label skew: for each label, the clients' shares are drawn from a symmetric Dirichlet distribution.

    Yurochkin et al., *Bayesian Nonparametric Federated Learning of Neural Networks*, 2019, section 4. Clients that come
    out smaller than ``min_size`` are topped up with random samples of the largest ones.
    """

    alpha: float
    """The concentration, > 0: towards 0 every label lies with one client, towards infinity all clients are alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("alpha", 0 < self.alpha < np.inf, "> 0")

    def owners(self, dataset: Dataset, rng: np.random.Generator) -> np.ndarray:
        """Cuts each label's shuffled samples in proportions of its own."""
        labels = _labels(dataset)
        owners = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            samples = rng.permutation(np.flatnonzero(labels == label))
            owners[samples] = _cut(len(samples), _dirichlet(self.clients, self.alpha, rng))
        return _topped_up(owners, self.clients, self.min_size, rng)


@dataclass(frozen=True, kw_only=True)
class QuantitySkew(Partitioner):
    """The clients' sizes are drawn from a symmetric Dirichlet distribution; their labels are alike.

    Li et al., *Federated Learning on Non-IID Data Silos*, 2022, section 4.3. Clients that come out smaller than
    ``min_size`` are topped up with random samples of the largest ones.
    """

    alpha: float
    """The concentration, > 0: small makes a few clients hold nearly everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("alpha", 0 < self.alpha < np.inf, "> 0")

    def owners(self, dataset: Dataset, rng: np.random.Generator) -> np.ndarray:
        """Cuts the shuffled samples in random proportions."""
        owners = np.empty(len(dataset), dtype=np.int64)
        owners[rng.permutation(len(dataset))] = _cut(len(dataset), _dirichlet(self.clients, self.alpha, rng))
        return _topped_up(owners, self.clients, self.min_size, rng)


@dataclass(frozen=True, kw_only=True)
class Shards(Partitioner):
    """The samples are sorted by label and cut into shards; every client gets as many, at random.

    McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, 2017, section 3: the
    "pathological non-IID" split. Shard sizes differ by one at most.
    """

    shards_per_client: int = 2
    """Number of shards of each client, ≥ 1; about as many labels will it have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("shards_per_client", self.shards_per_client >= 1, "≥ 1")

    def owners(self, dataset: Dataset, rng: np.random.Generator) -> np.ndarray:
        """Deals the shards out."""
        shards = self.clients * self.shards_per_client
        if shards > len(dataset):
            raise DataError(
                f"{len(dataset)} samples cannot be cut into {shards} shards: "
                f"use at most {len(dataset) // self.shards_per_client} clients, or fewer shards_per_client"
            )
        shuffled = rng.permutation(len(dataset))
        by_label = shuffled[np.argsort(_labels(dataset)[shuffled], kind="stable")]
        shard = np.arange(len(dataset)) * shards // len(dataset)
        owners = np.empty(len(dataset), dtype=np.int64)
        owners[by_label] = rng.permutation(shards)[shard] % self.clients
        return owners


@dataclass(frozen=True, kw_only=True)
class Natural:
    """One client for each natural id in the data, such as a subject, a speaker or a device, in the ids' order."""

    min_size: int = 1
    """The fewest samples that a client may have; a smaller one is refused, not dropped."""


def partition(dataset: Any, partitioner: Partitioner | Natural, *, seed: int = 0) -> Population:
    """Divides a data set among clients; every sample goes to exactly one.

    Args:
        dataset: What :func:`~shoal.data.as_dataset` takes.
        partitioner: The rule.
        seed: Decides everything that is drawn.

    Raises:
        DataError: There are too few samples, no labels or no ids for the rule.
    """
    data = as_dataset(dataset)
    if isinstance(partitioner, Natural):
        owners, names = _natural_owners(data)
        clients = len(names)
    else:
        clients, names = partitioner.clients, None
        _require_enough(len(data), clients, partitioner.min_size)
        owners = partitioner.owners(data, generator(seed, "partition"))
    sizes = np.bincount(owners, minlength=clients)
    if sizes.min() < partitioner.min_size:
        smallest = int(sizes.argmin())
        who = names[smallest] if names else f"client {smallest}"
        raise DataError(f"{who} has {sizes[smallest]} samples, fewer than min_size={partitioner.min_size}")
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    # A stable sort leaves each client's indices ascending, so that its samples are read in the order they lie in.
    order = np.argsort(owners, kind="stable")
    description = {"partition": {"name": type(partitioner).__name__, **dataclass_fields(partitioner)}, "seed": seed}
    return Population(data, order, offsets, names=names, description=description)


def _require_enough(samples: int, clients: int, min_size: int) -> None:
    if samples < clients * min_size:
        raise DataError(
            f"{samples} samples cannot give {clients} clients {min_size} each: "
            f"use at most {samples // min_size} clients"
        )


def _labels(dataset: Dataset) -> np.ndarray:
    labels = dataset.targets()
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"a partition by label needs one whole number for each sample, but the targets are {labels.dtype} of shape "
            f"{labels.shape}; use IID or QuantitySkew"
        )
    return labels


def _natural_owners(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    ids = dataset.ids if isinstance(dataset, ArrayDataset) else None
    if ids is None:
        raise DataError("the data have no natural ids: pass ArrayDataset(inputs, targets, ids=…)")
    values, owners = np.unique(ids, return_inverse=True)
    return owners, [str(value) for value in values]


def _dirichlet(clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Returns shares that sum to 1; for a tiny alpha, where all gamma variates underflow, one client gets all."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = rng.dirichlet(np.full(clients, alpha))
    return shares if np.isfinite(shares).all() else np.eye(1, clients, int(rng.integers(clients)))[0]


def _cut(samples: int, shares: np.ndarray) -> np.ndarray:
    """Returns the client of each of ``samples`` places in a row, cut in proportion to the shares."""
    ends = np.round(np.cumsum(shares) * samples).astype(np.int64)
    ends[-1] = samples
    return np.searchsorted(ends, np.arange(samples), side="right")


def _topped_up(owners: np.ndarray, clients: int, min_size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the owners after clients below ``min_size`` were given random samples of the largest clients."""
    sizes = np.bincount(owners, minlength=clients)
    lacking = np.maximum(min_size - sizes, 0)
    if not lacking.any():
        return owners
    # Down to which size the largest must come, so that what lies above it is just enough.
    level = _level(sizes, int(lacking.sum()), min_size)
    order = rng.permutation(len(owners))
    order = order[np.argsort(owners[order], kind="stable")]
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    spare = order[rank >= level]
    given = spare[np.argsort(-sizes[owners[spare]], kind="stable")][: lacking.sum()]
    owners = owners.copy()
    owners[given] = np.repeat(np.arange(clients), lacking)
    return owners


def _level(sizes: np.ndarray, wanted: int, min_size: int) -> int:
    low, high = min_size, int(sizes.max())
    while low < high:  # the largest level with enough samples above it
        middle = (low + high + 1) // 2
        if int(np.maximum(sizes - middle, 0).sum()) >= wanted:
            low = middle
        else:
            high = middle - 1
    return low
