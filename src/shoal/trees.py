"""Arithmetic on flat trees of arrays.

Every function takes numpy arrays and torch tensors alike, keeps them on their device, and imports no framework: it uses
operators and the few methods that the two kinds share by name or by a one-line equivalent. Sums are taken in float64,
so that the order of clients and the number of workers matter as little as they can.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np

from shoal.types import Array, Params

Framework = Literal["numpy", "torch"]

LARGE = 2**13
"""From how many numbers on an array's arithmetic takes longer than a call."""

SMALLEST_PIECE, LARGEST_PIECE = 2**12, 2**18
"""Numbers of a piece of an array: enough for a call to be worth it, and so few that a core's cache holds them."""


class Computed(Mapping[str, Array]):
    """A tree whose arrays are computed in float64 as they are asked for, piece by piece, and kept nowhere.

    Args:
        like: Arrays of the names and shapes to have.
    """

    def __init__(self, like: Params) -> None:
        self.like = like

    @abstractmethod
    def pieces(self, name: str, size: int) -> Iterator[Array]:
        """Computes an array, flat, ``size`` numbers at a time.

        A piece may be overwritten, and is valid until another is computed, of this tree or one that was made with it.
        """

    def __getitem__(self, name: str) -> Array:
        whole = _zeros(self.like[name])
        for part, piece in zip(in_pieces(whole, LARGEST_PIECE), self.pieces(name, LARGEST_PIECE), strict=True):
            part[...] = piece
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def framework(tree: Params) -> Framework:
    """Returns which kind of arrays a tree holds; an empty tree counts as numpy."""
    return "torch" if any(not _is_numpy(array) for array in tree.values()) else "numpy"


def widen(array: Array) -> Array:
    """Returns the array in float64, or the array itself where it is that already."""
    return np.asarray(array, dtype=np.float64) if _is_numpy(array) else array.double()


def cast_like(array: Array, reference: Array) -> Array:
    """Returns the array with the dtype and on the device of ``reference``, which is of the same kind."""
    return np.asarray(array, dtype=reference.dtype) if _is_numpy(reference) else array.to(reference)


def map_trees(function: Callable[..., Array], tree: Params, *others: Params) -> dict[str, Array]:
    """Returns ``{name: function(tree[name], *(other[name] for other in others))}``."""
    return {name: function(array, *(other[name] for other in others)) for name, array in tree.items()}


def copy(tree: Params) -> dict[str, Array]:
    """Returns a tree of copies that share no memory with the originals."""
    return map_trees(lambda array: np.array(array) if _is_numpy(array) else array.detach().clone(), tree)


def zeros(tree: Params) -> dict[str, Array]:
    """Returns float64 zeros with the names, shapes and devices of ``tree``."""
    return map_trees(_zeros, tree)


def difference(after: Params, before: Params) -> dict[str, Array]:
    """Returns ``after − before`` in float64."""
    return map_trees(_difference, after, before)


def advance(tree: Params, increment: Params, *, consume: bool = False) -> dict[str, Array]:
    """Returns ``tree + increment``, added in float64 and rounded once to the dtypes of ``tree``.

    Args:
        tree: What to add to.
        increment: What to add. One that is computed is never there as a whole.
        consume: Whether the arrays of ``increment``, in float64, may be overwritten. If it is a dict, each is taken out
            of it as soon as it is added: the sum then needs no more memory than that had.
    """
    if isinstance(increment, Computed):
        size = piece_size(tree)
        return {name: _advanced(array, increment.pieces(name, size), size) for name, array in tree.items()}
    if not consume:
        return map_trees(lambda array, step: cast_like(widen(array) + widen(step), array), tree, increment)
    take = increment.pop if isinstance(increment, dict) else increment.__getitem__
    return {name: cast_like(_added(take(name), array), array) for name, array in tree.items()}


def piece_size(tree: Params) -> int:
    """Returns how many numbers of an array to work on at once, so that they take little memory beside the tree's."""
    numbers: int = sum(math.prod(array.shape) for array in tree.values())
    return min(max(numbers // 32, SMALLEST_PIECE), LARGEST_PIECE)


def in_pieces(array: Array, size: int) -> Iterator[Array]:
    """Returns an array, flat, ``size`` numbers at a time: views of it where it is contiguous."""
    flat = array.reshape(-1)
    return (flat[start : start + size] for start in range(0, len(flat), size))


def pieces(tree: Params, name: str, size: int) -> Iterator[Array]:
    """Returns an array of a tree in pieces, computed as they are asked for where the tree is."""
    return tree.pieces(name, size) if isinstance(tree, Computed) else in_pieces(tree[name], size)


def add_scaled(total: dict[str, Array], tree: Params, scale: float) -> None:
    """Adds ``scale · tree`` to ``total`` in place."""
    for name, array in tree.items():
        _add_scaled(total[name], array, scale)


def add_rows(total: dict[str, Array], stacked: Params, weights: np.ndarray) -> None:
    """Adds ``Σ weights[k] · stacked[k]`` to ``total`` in place, in float64.

    The rows are added one after the other, so that in how many pieces they come makes no difference to the last bit.

    Args:
        total: Float64, contiguous.
        stacked: The names of ``total``; each array has one axis more, in front.
        weights: Shape [k].
    """
    for name, rows in stacked.items():
        sums, flat = total[name].reshape(-1), rows.reshape(len(weights), -1)
        if len(sums) < LARGE:
            factors = weights if _is_numpy(rows) else sums.new_tensor(weights)
            terms = widen(flat) * factors[:, None]
            terms[0] += sums
            sums[:] = _column_sums(terms)
            continue
        for row, weight in zip(flat, weights.tolist(), strict=True):
            # One row is widened at a time, because all of them at once would not fit the cache.
            _add_scaled(sums, row, weight)


def scaled(tree: Params, scale: float) -> dict[str, Array]:
    """Returns ``scale · tree``."""
    return map_trees(lambda array: array * scale, tree)


def all_finite(tree: Params) -> bool:
    """Tells whether no array holds NaN or infinity."""
    # A finite sum has finite terms; one number per array is read. Only a sum that is not finite is worth a closer look,
    # because large terms may have overflowed: for finite x, x − x is 0; for NaN and ±inf it is NaN.
    return all(math.isfinite(float(array.sum())) or float((array - array).sum()) == 0.0 for array in tree.values())


def norm(tree: Params) -> float:
    """Returns the Euclidean norm over all arrays together."""
    return math.sqrt(sum(float((widen(array) ** 2).sum()) for array in tree.values()))


def nbytes(tree: Params) -> int:
    """Returns the memory that the arrays' elements take, in bytes."""
    return sum(int(array.nbytes) for array in tree.values())


def mismatch(tree: Params, reference: Params) -> str | None:
    """Says how the names or shapes of ``tree`` differ from those of ``reference``; None where they do not."""
    missing, extra = sorted(reference.keys() - tree.keys()), sorted(tree.keys() - reference.keys())
    if missing or extra:
        parts = [
            f"{word} {', '.join(names[:3])}" for word, names in (("lacks", missing), ("has unknown", extra)) if names
        ]
        return " and ".join(parts)
    for name, array in reference.items():
        if tuple(tree[name].shape) != tuple(array.shape):
            return f"{name} has shape {tuple(tree[name].shape)} where {tuple(array.shape)} is expected"
    return None


def host(array: Array) -> np.ndarray:
    """Returns the array as numpy's, after waiting for the device that computes it."""
    return array if isinstance(array, np.ndarray) else np.asarray(array.detach().cpu())


def flatten(trees: Mapping[str, Params], separator: str = "/") -> dict[str, Array]:
    """Returns one tree with the names ``outer/inner``; an outer name must not hold the separator."""
    return {f"{outer}{separator}{inner}": array for outer, tree in trees.items() for inner, array in tree.items()}


def unflatten(tree: Params, separator: str = "/") -> dict[str, dict[str, Array]]:
    """Undoes :func:`flatten`."""
    trees: dict[str, dict[str, Array]] = {}
    for name, array in tree.items():
        outer, _, inner = name.partition(separator)
        trees.setdefault(outer, {})[inner] = array
    return trees


def _zeros(array: Array) -> Array:
    if _is_numpy(array):
        return np.zeros(np.shape(array))
    return array.new_zeros(0).double().new_zeros(array.shape)  # in float64 at once: a large array is not made twice


def _advanced(array: Array, pieces: Iterator[Array], size: int) -> Array:
    """Returns an array plus one in float64 that comes in pieces, which are overwritten."""
    after = _empty(array)
    for target, part, piece in zip(in_pieces(after, size), in_pieces(array, size), pieces, strict=True):
        target[...] = _added(piece, part)
    return after


def _empty(array: Array) -> Array:
    """Returns a contiguous array of the same shape and dtype, in the same place."""
    return np.empty(array.shape, array.dtype) if _is_numpy(array) else array.new_empty(array.shape)


def _added(wide: Array, array: Array) -> Array:
    """Adds an array to one in float64, in place."""
    wide += array
    return wide


def _difference(after: Array, before: Array) -> Array:
    wide = widen(after)
    if wide is after:
        return after - before
    wide -= before  # in place: large memory takes longer to get than to fill
    return wide


def _add_scaled(total: Array, array: Array, scale: float) -> None:
    if _is_numpy(array):
        total += widen(array) * scale
    else:
        total.add_(widen(array), alpha=scale)


def _column_sums(terms: Array) -> Array:
    """Returns the sum of the rows, added one after the other."""
    if _is_numpy(terms):
        return np.add.reduce(terms, axis=0)
    if terms.device.type == "cpu":  # in numpy, because torch has no sum of this order that is as fast
        return terms.new_tensor(np.add.reduce(terms.numpy(), axis=0))
    return terms.cumsum(0)[-1]


def _is_numpy(array: Array) -> bool:
    return isinstance(array, np.ndarray | np.generic)
