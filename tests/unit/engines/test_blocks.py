from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engines.blocks import SPREAD, BlockSearch, by_work, next_block


def planned(work, size):
    order, start, blocks = by_work(work), 0, []
    while start < len(order):
        blocks.append(next_block(order, work, start, size))
        start += len(blocks[-1])
    return blocks


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 20))
def test_each_client_is_in_one_block_with_its_like(work, size):
    blocks = planned(work, size)
    assert sorted(client for block in blocks for client in block) == list(range(len(work)))
    for block in blocks:
        assert len(block) <= size
        amounts = [work[client] for client in block]
        assert min(amounts) >= SPREAD * max(amounts)


def search(cost, *, first=20, largest=100, variants=("usual",), fixed=False):
    """Returns a finished search on a machine whose times are ``cost(size, variant)``, and what it tried."""
    found = BlockSearch(first, largest, variants, fixed=fixed)
    tried = []
    while found.choice is None:
        tried.append(found.current)
        found.record(cost(*found.current) if tried.count(found.current) > 1 else 1e9)  # the first time does not count
    return found, tried


def test_one_possibility_is_chosen_at_once():
    assert BlockSearch(7, 100, ("usual",), fixed=True).choice == (7, "usual")
    assert BlockSearch(20, 1, ("usual",)).choice == (1, "usual")


@pytest.mark.parametrize("best", [1, 2, 5, 10, 20, 50, 70, 100])
def test_the_search_finds_the_lowest_point_and_says_no_more_than_it_measured(best):
    found, tried = search(lambda size, _: abs(np.log(size / best)) + 1)
    sizes = sorted({size for size, _ in tried})
    assert found.current[0] == min(sizes, key=lambda size: abs(np.log(size / best)))
    assert len(tried) == 3 * len(sizes)
    assert abs(np.log(found.current[0] / best)) <= np.log(1.5)


def test_a_size_of_the_users_own_is_kept_and_variants_are_still_tried():
    found, tried = search(lambda _, variant: {"a": 2.0, "b": 1.0}[variant], first=7, variants=("a", "b"), fixed=True)
    assert found.choice == (7, "b")
    assert set(tried) == {(7, "a"), (7, "b")}


def test_a_variant_that_turns_out_not_to_work_is_left_in_the_search_and_after_it():
    found = BlockSearch(7, 7, ("a", "b", "c"), fixed=True)
    while found.current[1] != "b":
        found.record(2.0)
    found.leave("b")
    assert found.current == (7, "c")
    while found.choice is None:
        found.record(1.0)
    assert found.choice == (7, "c")
    found.leave("c")
    assert found.choice == found.current == (7, "a")
    last = BlockSearch(7, 7, ("a", "b"), fixed=True)
    last.leave("b")
    assert last.choice == (7, "a")


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_what_did_not_fit_is_never_tried_again(refused):
    found = BlockSearch(20, 300, ("usual",))
    for size in refused:
        found.refuse(size)
        while found.choice is None:
            assert found.current[0] <= max(size // 2, 1)
            found.record(1.0)
        assert found.current[0] <= max(size // 2, 1)
    assert found.current[0] >= 1
