"""Row 0: trees, randomness, descriptions and errors."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal import trees
from shoal.description import describe
from shoal.errors import ConfigurationError, MissingExtraError, ShoalError, unknown_name
from shoal.randomness import generator
from support import assert_equal

FLOATS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), elements=st.floats(-4, 4, width=32)
)
PAIRS = hnp.array_shapes(min_dims=0, max_dims=3).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=16)) for _ in range(2)])
)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@given(pair=PAIRS)
def test_what_advances_by_the_difference_arrives_exactly(pair, kind):
    before, after = ({"x": kind(np.asarray(array))} for array in pair)
    arrived = trees.advance(before, trees.difference(after, before))
    assert_equal(arrived, after)
    assert arrived["x"].dtype == before["x"].dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_in_float64_and_dtypes_come_back(dtype):
    tree = {"x": torch.tensor([1.5, -2.0], dtype=dtype)}
    total = trees.zeros(tree)
    trees.add_scaled(total, tree, 3.0)
    assert total["x"].dtype == torch.float64
    assert total["x"].tolist() == [4.5, -6.0]
    assert trees.advance(tree, total)["x"].dtype == dtype


@given(FLOATS, st.floats(-3, 3))
def test_numpy_and_torch_do_the_same(array, factor):
    numpy_tree, torch_tree = {"x": array}, {"x": torch.as_tensor(array)}
    for function in (trees.zeros, trees.copy, partial(trees.scaled, scale=factor)):
        assert_equal(function(numpy_tree), function(torch_tree), atol=1e-6)
    assert trees.norm(numpy_tree) == pytest.approx(trees.norm(torch_tree))
    assert trees.nbytes(numpy_tree) == trees.nbytes(torch_tree) == array.nbytes
    assert trees.all_finite(numpy_tree) is trees.all_finite(torch_tree) is True


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [1.0, np.nan, 2.0]])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_not_finite_is_found_wherever_it_is(kind, values):
    assert not trees.all_finite({"a": kind([1.0]), "b": kind(values)})


def test_copies_share_no_memory():
    for array in (np.zeros(3), torch.zeros(3)):
        made = trees.copy({"x": array})
        made["x"][0] = 1
        assert array[0] == 0


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"a": np.zeros(2), "b": np.zeros((1, 3))}, None),
        ({"a": np.zeros(2)}, "lacks b"),
        ({"a": np.zeros(2), "b": np.zeros((1, 3)), "c": np.zeros(1)}, "has unknown c"),
        ({"a": np.zeros(2), "c": np.zeros(1)}, "lacks b and has unknown c"),
        ({"a": np.zeros(3), "b": np.zeros((1, 3))}, "a has shape (3,) where (2,) is expected"),
    ],
)
def test_mismatches_are_said(tree, expected):
    assert trees.mismatch(tree, {"a": np.zeros(2), "b": np.zeros((1, 3))}) == expected


@given(
    st.dictionaries(
        st.sampled_from("ab"), st.dictionaries(st.text("xy/.", min_size=1, max_size=3), st.just(1), min_size=1)
    )
)
def test_flattening_can_be_undone(nested):
    assert trees.unflatten(trees.flatten(nested)) == nested


def draw(seed, purpose, **place):
    return generator(seed, purpose, **place).integers(2**62)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["fit", "cohort"]), st.integers(0, 3), st.integers(0, 3)),
        min_size=2, max_size=6, unique=True,
    )
)  # fmt: skip
def test_every_use_of_randomness_is_its_own(uses):
    drawn = [draw(seed, purpose, round=number, client=client) for seed, purpose, number, client in uses]
    assert len(set(drawn)) == len(drawn)
    assert drawn == [draw(seed, purpose, round=number, client=client) for seed, purpose, number, client in uses]


def test_the_numbers_stay_the_same_from_release_to_release():
    assert draw(0, "fit", round=1, client=2) == 3859883073759159038


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1", None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ConfigurationError, match="the seed must be a whole number ≥ 0"):
        generator(seed, "fit")


def test_names_near_a_misspelt_one_are_offered():
    assert str(unknown_name("engine", "Sequentail", ["sequential", "process"])) == (
        "unknown engine 'Sequentail'; did you mean 'sequential'?"
    )
    assert str(unknown_name("engine", "zzz", ["b", "a"])) == "unknown engine 'zzz'; known: a, b"


def test_a_missing_extra_is_an_import_error_with_the_command():
    error = MissingExtraError("plotly", purpose="draw a report", extra="tracking")
    assert isinstance(error, ImportError)
    assert isinstance(error, ShoalError)
    assert str(error) == "plotly is needed to draw a report and is not installed: pip install 'shoal[tracking]'"


@dataclasses.dataclass
class Config:
    rate: float
    path: Path
    _private: int = 3


def test_descriptions_are_json_and_tell_things_apart():
    def closing_over(value):
        return lambda: value

    assert describe(Config(0.5, Path("a"))) == {"name": "Config", "rate": 0.5, "path": "a"}
    assert describe(partial(torch.optim.SGD, lr=0.1)) == {"call": "torch.optim.sgd.SGD", "args": [], "lr": 0.1}
    assert describe({1: (np.float32(0.5), {3, 1})}) == {"1": [0.5, [1, 3]]}
    assert describe(closing_over(1)) == describe(closing_over(1)) != describe(closing_over(2))
    assert describe(torch.nn.functional.relu) == "torch.nn.functional.relu"


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5000)])
def test_rows_are_added_as_if_one_by_one(kind, shape):
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(7, *shape)).astype(np.float32), rng.uniform(1, 9, size=7)
    at_once, in_parts = (trees.zeros({"x": kind(rows[0])}) for _ in range(2))
    trees.add_rows(at_once, {"x": kind(rows)}, weights)
    for part in (slice(0, 1), slice(1, 4), slice(4, 7)):
        trees.add_rows(in_parts, {"x": kind(rows[part])}, weights[part])
    assert np.array_equal(trees.host(at_once["x"]), trees.host(in_parts["x"]))  # to the last bit
    np.testing.assert_allclose(trees.host(at_once["x"]), np.tensordot(weights, rows.astype(np.float64), 1), rtol=1e-12)
