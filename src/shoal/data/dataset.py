"""Data of one client, or of all: samples by index, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from shoal.data.chunks import chunks, digest
from shoal.errors import ConfigurationError, DataError


@runtime_checkable
class Dataset(Protocol):
    """Pairs of inputs and targets by index."""

    @property
    def classes(self) -> int | None:
        """Number of classes of the targets; None where they are no classes, or their number is not known."""
        ...  # pragma: no cover

    def __len__(self) -> int: ...  # pragma: no cover

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the inputs [n, …] and the targets [n, …] of the samples, in the order of ``indices``, as copies."""
        ...  # pragma: no cover

    def targets(self) -> np.ndarray:
        """Returns the targets of all samples, if need be by reading every sample."""
        ...  # pragma: no cover

    def known_targets(self) -> np.ndarray | None:
        """Returns the targets of all samples, or None where every sample would have to be read for them."""
        ...  # pragma: no cover

    def check(self) -> None:
        """Looks at all samples once.

        Raises:
            DataError: There is none, a number is not finite, or a label is out of range.
        """
        ...  # pragma: no cover

    def describe(self) -> dict[str, Any]:
        """Returns what the data are, as JSON that differs where the data do."""
        ...  # pragma: no cover


class ArrayDataset:
    """Samples in two arrays, in memory or memory-mapped.

    Args:
        inputs: Shape [n, …], any dtype: numpy, ``numpy.memmap``, or what numpy can view, such as a torch tensor.
        targets: Shape [n, …]; class labels are integers from 0.
        classes: Number of classes, where the targets are classes and it is known.
        ids: The natural client of each sample, shape [n], integers or strings; for :class:`~shoal.data.Natural`.
        name: What messages and reports call the data.

    Raises:
        DataError: The arrays differ in length.
    """

    def __init__(
        self, inputs: Any, targets: Any, *, classes: int | None = None, ids: Any = None, name: str = "arrays"
    ) -> None:
        self.inputs = _as_array(inputs)
        self._targets = _as_array(targets)
        self.classes = classes
        self.ids = None if ids is None else np.asarray(ids)
        self.name = name
        lengths = {"inputs": self.inputs, "targets": self._targets, "ids": self.ids}
        for what, array in lengths.items():
            if array is not None and (array.ndim == 0 or len(array) != len(self.inputs)):
                raise DataError(f"{name}: {len(self.inputs)} inputs, but {what} of shape {array.shape}")

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns copies of the samples' inputs and targets."""
        return np.asarray(self.inputs[indices]), np.asarray(self._targets[indices])

    def targets(self) -> np.ndarray:
        """Returns the targets of all samples."""
        return self._targets

    def known_targets(self) -> np.ndarray:
        """Returns the targets of all samples."""
        return self._targets

    def check(self) -> None:
        """Looks at all samples once, a chunk at a time.

        Raises:
            DataError: There is none, a number is not finite, or a label is out of range.
        """
        if len(self) == 0:
            raise DataError(f"{self.name}: there is no sample")
        for what, array in (("an input", self.inputs), ("a target", self._targets)):
            if np.issubdtype(array.dtype, np.inexact):
                self._refuse(array, lambda chunk: ~np.isfinite(chunk), f"has {what} that is NaN or infinite")
        self.check_labels()

    def check_labels(self) -> None:
        """Looks at the labels, if they are classes and their number is known.

        Raises:
            DataError: A label is out of range.
        """
        if self.classes is not None:
            top = self.classes - 1
            self._refuse(self._targets, lambda y: (y < 0) | (y > top), f"has a label outside 0 to {top}")

    def describe(self) -> dict[str, Any]:
        """Returns the shapes, the dtypes, and a digest of some samples."""
        spots = np.unique(np.linspace(0, max(len(self) - 1, 0), 64).astype(np.int64))[: len(self)]
        return {
            "name": self.name,
            "samples": len(self),
            "inputs": [str(self.inputs.dtype), *self.inputs.shape[1:]],
            "targets": [str(self._targets.dtype), *self._targets.shape[1:]],
            "digest": digest(self.inputs[spots], self._targets),
        }

    def _refuse(self, array: np.ndarray, is_wrong: Callable[[np.ndarray], np.ndarray], what: str) -> None:
        for start, chunk in chunks(array):
            wrong = is_wrong(chunk).reshape(len(chunk), -1).any(axis=1)
            if wrong.any():
                raise DataError(f"{self.name}: sample {start + int(wrong.argmax())} {what}")


class ItemDataset:
    """A map-style torch ``Dataset``, or any sequence of (input, target) pairs, read item by item.

    Args:
        items: Has ``__len__`` and ``__getitem__``.
        name: What messages and reports call the data.

    Raises:
        ConfigurationError: The items cannot be reached by index.
    """

    classes: int | None = None
    """Not known."""

    def __init__(self, items: Any, *, name: str | None = None) -> None:
        self._name = name or type(items).__name__
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise ConfigurationError(
                f"{self._name} has no length and no items by index, so clients cannot be given parts of it; "
                "use a map-style data set, or load it into arrays"
            )
        self._items = items
        self._cached_targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._items)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads the items one by one and stacks them.

        Raises:
            DataError: An item is no pair of an input and a target.
        """
        pairs = [self._items[int(index)] for index in indices]
        for index, pair in zip(indices, pairs, strict=True):
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                raise DataError(
                    f"{self._name}: item {index} is {type(pair).__name__}, and must be a pair (input, target)"
                )
        inputs, targets = zip(*pairs, strict=True)
        return np.stack([np.asarray(item) for item in inputs]), np.stack([np.asarray(item) for item in targets])

    def targets(self) -> np.ndarray:
        """Returns the items' targets: the data set's own list of them where it has one, else after one pass."""
        known = self.known_targets()
        if known is None:
            known = self._cached_targets = np.asarray([target for _, target in self._pairs()])
        return known

    def known_targets(self) -> np.ndarray | None:
        """Returns the targets if the data set lists them itself, or they were read before."""
        own = getattr(self._items, "targets", None)
        return np.asarray(own) if own is not None and len(own) == len(self) else self._cached_targets

    def check(self) -> None:
        """Makes sure that there is a sample. The items themselves are looked at when they are trained on."""
        if len(self) == 0:
            raise DataError(f"{self._name}: there is no sample")

    def describe(self) -> dict[str, Any]:
        """Returns the name, the length, and a digest of the first sample."""
        return {"name": self._name, "samples": len(self), "digest": digest(*self.take(np.arange(1)))}

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        return (self._items[index] for index in range(len(self)))


class Subset:
    """Some samples of a data set, read from it when they are asked for.

    Args:
        dataset: Where the samples are.
        indices: Which ones, in order.
    """

    def __init__(self, dataset: Dataset, indices: np.ndarray) -> None:
        if isinstance(dataset, Subset):  # a part of a part costs one look-up, not two
            indices = dataset.indices[indices]
            dataset = dataset.dataset
        self.dataset: Dataset = dataset
        self.indices: np.ndarray = indices

    @property
    def classes(self) -> int | None:
        """Number of classes of the data set."""
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns copies of the samples' inputs and targets."""
        return self.dataset.take(self.indices[indices])

    def targets(self) -> np.ndarray:
        """Returns the targets of the subset."""
        labels: np.ndarray = self.dataset.targets()[self.indices]
        return labels

    def known_targets(self) -> np.ndarray | None:
        """Returns the targets of the subset, if they are known without reading samples."""
        known = self.dataset.known_targets()
        return None if known is None else known[self.indices]

    def check(self) -> None:
        """Looks at all samples of the subset once, where they are in memory; others when they are trained on.

        Raises:
            DataError: There is none, a number is not finite, or a label is out of range.
        """
        if len(self) == 0:
            raise DataError("there is no sample")
        if isinstance(self.dataset, ArrayDataset):
            ArrayDataset(*self.take(np.arange(len(self))), classes=self.classes).check()

    def describe(self) -> dict[str, Any]:
        """Returns the data set and a digest of the indices."""
        return {"of": self.dataset.describe(), "samples": len(self), "digest": digest(self.indices)}


def as_dataset(data: Any, *, name: str = "arrays") -> Dataset:
    """Returns a data set for what users have.

    Args:
        data: A data set of shoal's; a pair (inputs, targets) of arrays; a torch ``Dataset`` with a length.
        name: What messages and reports call a pair of arrays.

    Raises:
        ConfigurationError: It is none of these.
        DataError: The arrays of a pair differ in length.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, tuple) and len(data) == 2:
        return ArrayDataset(*data, name=name)
    tensors = getattr(data, "tensors", None)  # torch's TensorDataset
    if isinstance(tensors, tuple) and len(tensors) == 2:
        return ArrayDataset(*tensors, name=type(data).__name__)
    if hasattr(data, "__getitem__") and not isinstance(data, str | bytes | Mapping):
        return ItemDataset(data)
    raise ConfigurationError(
        f"{type(data).__name__} is no data set; pass a pair of arrays (inputs, targets), or a torch Dataset "
        "with __len__ and __getitem__"
    )


def split(dataset: Dataset, fraction: float, rng: np.random.Generator) -> tuple[Subset, Subset]:
    """Returns two disjoint parts that together are the whole, each with at least one sample.

    Args:
        dataset: At least two samples.
        fraction: The second part's share, in (0, 1).
        rng: Decides which samples.

    Raises:
        DataError: There are fewer than two samples.
    """
    count = len(dataset)
    if count < 2:
        raise DataError(f"{count} samples cannot be split in two parts")
    held_out = min(max(round(count * fraction), 1), count - 1)
    order = rng.permutation(count)
    return Subset(dataset, np.sort(order[held_out:])), Subset(dataset, np.sort(order[:held_out]))


def _as_array(data: Any) -> np.ndarray:
    if isinstance(data, np.ndarray):
        return data
    if hasattr(data, "detach"):  # a torch tensor, on any device
        data = data.detach().cpu()
    return np.asarray(data)
