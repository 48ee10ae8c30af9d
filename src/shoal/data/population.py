"""All clients of a federation, as index arrays over one data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from shoal.data.chunks import digest
from shoal.data.dataset import Dataset, Subset, as_dataset
from shoal.errors import ConfigurationError, DataError


class Population(Sequence[Dataset]):
    """The clients, each a part of one data set. A client costs 8 bytes, and a sample 8 more; its data are read lazily.

    Args:
        dataset: All samples.
        order: Indices of the samples, client after client, shape [samples].
        offsets: Where each client's indices begin in ``order``, and their end; shape [clients + 1], ascending.
        names: What messages call the clients; None for "client 0" and so on.
        description: How the samples came to the clients, as JSON.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: np.ndarray,
        offsets: np.ndarray,
        *,
        names: Sequence[str] | None = None,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self._order = order
        self._offsets = offsets
        self._names = names
        self._description = dict(description or {})

    @classmethod
    def from_datasets(cls, datasets: Sequence[Any], *, names: Sequence[str] | None = None) -> Population:
        """Returns a population whose clients have a data set each.

        Args:
            datasets: What :func:`~shoal.data.as_dataset` takes, one for each client.
            names: What messages call the clients, each in its own way.

        Raises:
            ConfigurationError: A name is missing or there twice, or something is no data set.
        """
        if isinstance(datasets, str | bytes) or not isinstance(datasets, Sequence):
            raise ConfigurationError(
                f"clients must be a Population or a sequence with one data set for each client, "
                f"not {type(datasets).__name__}; shoal.data.partition divides one data set"
            )
        if names is not None:
            _check_names([str(name) for name in names], len(datasets))
        parts = [as_dataset(data, name=f"client {client}") for client, data in enumerate(datasets)]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        return cls(_Concatenation(parts, offsets), np.arange(offsets[-1]), offsets, names=names)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, client: int) -> Dataset: ...
    @overload
    def __getitem__(self, client: slice) -> Sequence[Dataset]: ...
    def __getitem__(self, client: int | slice) -> Dataset | Sequence[Dataset]:
        if isinstance(client, slice):
            return [self[index] for index in range(*client.indices(len(self)))]
        count = len(self)
        if not -count <= client < count:
            raise IndexError(f"client {client} of {count}")
        first = client % count
        start, end = self._offsets[first : first + 2].tolist()  # numpy's own numbers make a slow slice
        return Subset(self.dataset, self._order[start:end])

    @property
    def sizes(self) -> np.ndarray:
        """Number of samples of each client, shape [clients]."""
        return np.diff(self._offsets)

    @property
    def title(self) -> str:
        """What a picture of the population is headed by, such as "Dirichlet(alpha=0.3)"."""
        rule = dict(self._description.get("partition", {}))
        name = rule.pop("name", "clients")
        told = ", ".join(f"{key}={value}" for key, value in rule.items() if key not in ("clients", "min_size"))
        return f"{name}({told})" if told else name

    @property
    def named(self) -> bool:
        """Whether the clients have names of their own."""
        return self._names is not None

    def name(self, client: int) -> str:
        """Returns what messages call the client."""
        return f"client {client}" if self._names is None else str(self._names[client])

    def check(self) -> None:
        """Looks at all data once.

        Raises:
            DataError: There are no clients, a client is empty, a number is not finite, or a label is out of range.
        """
        if len(self) == 0:
            raise DataError("there are no clients")
        empty = np.flatnonzero(self.sizes == 0)
        if len(empty):
            others = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise DataError(f"{self.name(int(empty[0]))}{others} has no samples; leave it out of the population")
        self.dataset.check()

    def label_counts(self, clients: Sequence[int]) -> np.ndarray | None:
        """Returns how many samples of each label some clients have, shape [clients, labels].

        None where the targets are no classes, or every sample would have to be read for them.
        """
        targets = self.dataset.known_targets()
        if targets is None or targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
            return None
        labels = self.dataset.classes or int(targets.max(initial=0)) + 1
        rows = [targets[self._order[self._offsets[client] : self._offsets[client + 1]]] for client in clients]
        return np.stack([np.bincount(row, minlength=labels) for row in rows])

    def describe(self) -> dict[str, Any]:
        """Returns how many clients there are, how they came about, and digests that differ where the data do."""
        return {
            **self._description,
            "clients": len(self),
            "dataset": self.dataset.describe(),
            "digest": digest(self._order, self._offsets),
        }


def _check_names(names: Sequence[str], clients: int) -> None:
    if len(names) != clients:
        raise ConfigurationError(f"{len(names)} names were given for {clients} clients")
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise ConfigurationError(f"{times} clients are called {name!r}: give each a name of its own")


class _Concatenation:
    """Data sets one after the other, under one numbering."""

    def __init__(self, parts: Sequence[Dataset], offsets: np.ndarray) -> None:
        self._parts = parts
        self._offsets = offsets
        self.classes = max((part.classes or 0 for part in parts), default=0) or None

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        owners = np.searchsorted(self._offsets, indices, side="right") - 1
        inputs: list[Any] = [None] * len(indices)
        targets: list[Any] = [None] * len(indices)
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            taken = self._parts[owner].take(indices[places] - self._offsets[owner])
            for place, one_input, one_target in zip(places, *taken, strict=True):
                inputs[place], targets[place] = one_input, one_target
        return np.stack(inputs), np.stack(targets)

    def targets(self) -> np.ndarray:
        return np.concatenate([part.targets() for part in self._parts])

    def known_targets(self) -> np.ndarray | None:
        known = [part.known_targets() for part in self._parts]
        present = [targets for targets in known if targets is not None]
        return np.concatenate(present) if present and len(present) == len(known) else None

    def check(self) -> None:
        for part in self._parts:
            part.check()

    def describe(self) -> dict[str, Any]:
        return {"parts": [part.describe() for part in self._parts]}
