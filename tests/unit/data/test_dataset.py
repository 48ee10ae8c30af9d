from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.data import ArrayDataset, ItemDataset, Population, Subset, as_dataset, split
from shoal.data.chunks import chunks, digest
from shoal.errors import ConfigurationError, DataError


def dataset(count=10):
    return ArrayDataset(np.arange(3.0 * count).reshape(count, 3), np.arange(count) % 3, classes=3, name="mine")


@given(st.integers(2, 50), st.floats(0.01, 0.99), st.integers(0, 99))
def test_a_split_is_two_parts_of_the_whole(count, fraction, seed):
    rest, held_out = split(dataset(count), fraction, np.random.default_rng(seed))
    both = np.concatenate([rest.indices, held_out.indices])
    assert sorted(both.tolist()) == list(range(count))
    assert min(len(rest), len(held_out)) >= 1
    assert abs(len(held_out) - count * fraction) <= 1


def test_one_sample_cannot_be_split():
    with pytest.raises(DataError, match="1 samples cannot be split"):
        split(dataset(1), 0.5, np.random.default_rng(0))


def test_a_subset_of_a_subset_reads_the_data_set_itself():
    part = Subset(Subset(dataset(), np.array([2, 4, 6, 8])), np.array([3, 1]))
    assert part.indices.tolist() == [8, 4]
    inputs, targets = part.take(np.array([1, 0]))
    assert inputs[:, 0].tolist() == [12.0, 24.0]
    assert targets.tolist() == [1, 2]
    assert part.targets().tolist() == [2, 1]
    assert not isinstance(part.dataset, Subset)


def test_what_is_taken_is_a_copy():
    data = dataset()
    taken, _ = data.take(np.array([0, 1]))
    taken[:] = -1
    assert data.inputs[0, 0] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 123_456, 199_999])
def test_check_names_the_sample_that_is_not_finite(value, place):
    inputs = np.zeros((200_000, 30), np.float32)  # more than one chunk
    inputs[place, 7] = value
    with pytest.raises(DataError, match=f"^mine: sample {place} has an input that is NaN or infinite$"):
        ArrayDataset(inputs, np.zeros(len(inputs), int), name="mine").check()


def test_check_looks_at_targets_and_lengths():
    with pytest.raises(DataError, match="sample 1 has a target that is NaN"):
        ArrayDataset(np.zeros(3), np.array([0, np.nan, 1])).check()
    with pytest.raises(DataError, match="mine: 3 inputs, but targets of shape .2,."):
        ArrayDataset(np.zeros(3), np.zeros(2), name="mine")
    with pytest.raises(DataError, match="there is no sample"):
        ArrayDataset(np.zeros((0, 2)), np.zeros(0)).check()


def test_a_memory_mapped_array_is_read_where_it_is_asked_for(tmp_path):
    path = tmp_path / "inputs.npy"
    np.save(path, np.arange(20.0).reshape(10, 2))
    mapped = np.load(path, mmap_mode="r")
    data = ArrayDataset(mapped, np.arange(10))
    data.check()
    assert isinstance(data.inputs, np.memmap)
    inputs, _ = data.take(np.array([3, 7]))
    assert not isinstance(inputs, np.memmap)
    assert inputs.tolist() == [[6.0, 7.0], [14.0, 15.0]]


class Squares(torch.utils.data.Dataset):
    def __init__(self):
        self.read = []

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.read.append(index)
        return torch.full((2,), float(index**2)), index % 2


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(0, 0)])


def test_a_torch_dataset_is_read_item_by_item():
    items = Squares()
    data = as_dataset(items)
    assert isinstance(data, ItemDataset)
    inputs, targets = data.take(np.array([5, 2]))
    assert items.read == [5, 2]
    assert inputs.tolist() == [[25.0, 25.0], [4.0, 4.0]]
    assert targets.tolist() == [1, 0]
    items.read.clear()
    assert data.known_targets() is None
    assert as_dataset(Subset(data, np.arange(2))).known_targets() is None
    assert items.read == []
    assert data.targets().tolist() == [0, 1] * 3
    assert data.known_targets().tolist() == [0, 1] * 3
    items.read.clear()
    assert data.targets().tolist() == [0, 1] * 3
    assert items.read == []  # one pass is enough


@pytest.mark.parametrize("items", [[{"x": 1, "y": 2}], [(1, 2, 3)], Population.from_datasets([dataset()])])
def test_items_must_be_pairs(items):
    with pytest.raises(DataError, match=r"item 0 is \w+, and must be a pair"):
        as_dataset(items).take(np.array([0]))


def test_targets_that_a_data_set_lists_itself_are_used():
    items = Squares()
    items.targets = [7] * 6
    assert ItemDataset(items).targets().tolist() == [7] * 6
    assert items.read == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "int is no data set; pass a pair of arrays"),
        (Stream(), "Stream has no length"),
        ("text", "str is no data set"),
        ({"a": 1}, "dict is no data set"),
    ],
)
def test_what_is_no_data_set_is_refused(data, message):
    with pytest.raises(ConfigurationError, match=message):
        as_dataset(data)


def test_pairs_and_tensors_become_array_data_sets():
    pair = as_dataset((np.zeros((4, 2)), np.zeros(4, int)))
    tensors = as_dataset(torch.utils.data.TensorDataset(torch.ones(4, 2, requires_grad=True), torch.zeros(4)))
    assert isinstance(pair, ArrayDataset)
    assert isinstance(tensors, ArrayDataset)
    assert tensors.inputs.tolist() == [[1.0, 1.0]] * 4
    assert as_dataset(pair) is pair


def test_a_population_of_several_data_sets_reads_each_lazily_in_any_order():
    squares = Squares()
    population = Population.from_datasets(
        [dataset(4), squares, (np.ones((2, 2)), np.ones(2, int))], names=["a", "b", "c"]
    )
    assert population.sizes.tolist() == [4, 6, 2]
    assert population.name(1) == "b"
    assert squares.read == []
    inputs, targets = population[1].take(np.array([4, 0]))
    assert inputs[:, 0].tolist() == [16.0, 0.0]
    assert targets.tolist() == [0, 0]
    assert squares.read == [4, 0]
    inputs, _ = Population.from_datasets([dataset(2), dataset(3)]).dataset.take(np.array([4, 0, 2, 1]))
    assert inputs[:, 0].tolist() == [6.0, 0.0, 0.0, 3.0]
    assert len(population[0:2]) == 2
    assert len(population[-1]) == 2
    with pytest.raises(IndexError):
        population[3]
    with pytest.raises(ConfigurationError, match="2 names were given for 1 clients"):
        Population.from_datasets([dataset()], names=["a", "b"])


@pytest.mark.parametrize(("names", "twice"), [(("a", "b", "a"), "2 clients are called 'a'"), ((1, "2", "1"), "'1'")])
def test_clients_of_one_name_are_refused(names, twice):
    with pytest.raises(ConfigurationError, match=f"{twice}: give each a name of its own"):
        Population.from_datasets([dataset()] * 3, names=names)
    assert Population.from_datasets([], names=[]).named


def test_descriptions_tell_data_apart():
    changed = dataset()
    changed.targets()[3] = 2
    assert dataset().describe() == dataset().describe() != changed.describe()
    one = Population(dataset(), np.arange(10), np.array([0, 5, 10]))
    other = Population(dataset(), np.arange(10), np.array([0, 6, 10]))
    assert one.describe() != other.describe()


@given(st.integers(0, 40), st.integers(1, 5))
def test_chunks_are_the_whole_in_order(rows, columns):
    array = np.arange(rows * columns, dtype=np.float64).reshape(rows, columns)
    parts = list(chunks(array))
    assert [start for start, _ in parts] == np.cumsum([0, *(len(part) for _, part in parts)])[:-1].tolist()
    assert np.array_equal(np.concatenate([np.zeros((0, columns)), *(part for _, part in parts)]), array)


def test_digests_see_dtypes_shapes_and_order():
    a = np.arange(6)
    found = {digest(a), digest(a.astype(np.float64)), digest(a.reshape(2, 3)), digest(a[::-1]), digest(a, a)}
    assert len(found) == 5
    assert digest(a) == digest(a.copy())
