from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal import trees

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
dtypes = st.sampled_from(["float64", "float32", "float16", "bfloat16"])


class Thirds(trees.Computed):
    """A third of each array, computed in one memory for all of its pieces."""

    def pieces(self, name, size):
        memory = None
        for part in trees.in_pieces(self.like[name], size):
            memory = trees.zeros({name: part})[name] if memory is None else memory
            third = memory[: len(part)]
            third[...] = part
            third /= 3
            yield third


def of_numbers(shape, dtype, kind):
    """Returns an array of numpy's or torch's with a few different numbers."""
    tensor = (torch.arange(int(np.prod(shape))) * 0.7 - 3).reshape(shape).to(getattr(torch, dtype))
    return tensor.float().numpy() if kind == "numpy" else tensor


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@given(shape=shapes, dtype=dtypes, size=st.integers(1, 300))
def test_what_is_computed_is_the_same_whole_and_in_pieces(kind, shape, dtype, size):
    tree = {"w": of_numbers(shape, dtype, kind)}
    third = Thirds(tree)
    whole = trees.host(third["w"])
    assert whole.dtype == np.float64
    assert whole.shape == tuple(shape)
    np.testing.assert_array_equal(whole, trees.host(trees.widen(tree["w"])) / 3)
    pieces = [np.array(trees.host(piece)) for piece in trees.pieces(third, "w", size)]
    assert all(len(piece) == size for piece in pieces[:-1])
    np.testing.assert_array_equal(np.concatenate([*pieces, np.empty(0)]), whole.reshape(-1))
    assert list(third) == ["w"]
    assert len(third) == 1


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@given(shape=shapes, dtype=dtypes, size=st.integers(1, 300))
def test_an_array_in_pieces_is_the_array(kind, shape, dtype, size):
    array = of_numbers(shape, dtype, kind)
    pieces = [trees.host(trees.widen(piece)) for piece in trees.pieces({"w": array}, "w", size)]
    np.testing.assert_array_equal(np.concatenate([*pieces, np.empty(0)]), trees.host(trees.widen(array)).reshape(-1))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@given(shape=shapes, dtype=dtypes, consume=st.booleans(), size=st.integers(1, 300))
def test_a_step_along_what_is_computed_has_the_bits_of_one_along_arrays(kind, shape, dtype, consume, size):
    tree = {"w": of_numbers(shape, dtype, kind), "b": of_numbers((3,), dtype, kind)}
    before = trees.copy(tree)
    expected = trees.advance(tree, dict(Thirds(tree)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "piece_size", lambda _: size)
        after = trees.advance(tree, Thirds(tree), consume=consume)
    for name, array in tree.items():
        assert after[name].dtype == array.dtype
        assert tuple(after[name].shape) == tuple(array.shape)
        np.testing.assert_array_equal(*(trees.host(trees.widen(one[name])) for one in (after, expected)))
        np.testing.assert_array_equal(*(trees.host(trees.widen(one[name])) for one in (tree, before)))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_arrays_that_are_not_contiguous_are_advanced_too(kind, order):
    tree = {"w": of_numbers((2, 3, 4), "float32", kind)}
    turned = {"w": tree["w"].transpose(*order) if kind == "numpy" else tree["w"].permute(*order)}
    after = trees.advance(turned, Thirds(turned))["w"]
    whole = trees.advance(tree, Thirds(tree))["w"]
    np.testing.assert_array_equal(trees.host(after), np.transpose(trees.host(whole), order))


@pytest.mark.parametrize(
    ("sizes", "piece"),
    [
        ([], trees.SMALLEST_PIECE),
        ([7, 9], trees.SMALLEST_PIECE),
        ([2**20], 2**15),
        ([2**19, 2**19], 2**15),
        ([2**25], trees.LARGEST_PIECE),
    ],
)
def test_a_piece_is_a_small_part_of_the_tree_within_bounds(sizes, piece):
    assert trees.piece_size({str(n): np.empty(size, np.float32) for n, size in enumerate(sizes)}) == piece
