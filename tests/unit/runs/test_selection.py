from __future__ import annotations

import math

import pytest

from shoal.runs import Criteria, Selection
from shoal.runs.selection import Choice


def follow(values, metric="accuracy", **criteria):
    """Returns the best of a series of values, and after which of them the run stops, and why."""
    selection = Selection(Criteria(limit=len(values), unit="epoch", **criteria))
    for number, value in enumerate(values, 1):
        selection.update(number, {metric: value})
        if (reason := selection.stop_reason(number, elapsed=10.0 * number)) is not None:
            return selection.best, number, reason
    raise AssertionError("it never stops")


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("accuracy", [0.1, 0.3, 0.2], 2),
        ("accuracy", [0.3, 0.3, 0.3], 1),
        ("loss", [0.3, 0.1, 0.2], 2),
        ("top5_error", [0.3, 0.1, 0.2], 2),
        ("loss", [math.nan, 0.5, math.nan], 2),
        ("accuracy", [math.nan, 0.2, 0.1], 2),
    ],
)
def test_the_first_of_the_best_is_chosen(metric, values, best):
    chosen, stopped, reason = follow(values, metric)
    assert chosen == Choice(number=best, metric=metric, value=values[best - 1])
    assert (stopped, reason) == (3, "all epochs done")


def test_where_nothing_is_a_number_nothing_is_the_best():
    assert follow([math.nan, math.nan], patience=1)[0] is None


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [({"loss": 1.0, "accuracy": 0.5}, "accuracy"), ({"f1": 0.5, "loss": 1.0}, "loss"), ({"f1": 0.5}, "f1")],
)
def test_what_is_usual_is_chosen_by_unless_something_is_named(measured, chosen):
    selection = Selection(Criteria(limit=1, unit="epoch"))
    selection.update(1, measured)
    assert selection.best.metric == chosen


@pytest.mark.parametrize(
    ("values", "patience", "stopped"),
    [
        ([0.1, 0.2, 0.2, 0.2, 0.9], 2, 4),
        ([0.5, 0.4, 0.6, 0.5, 0.5, 0.5], 3, 6),
        ([0.5, 0.4], 1, 2),
        ([0.1, 0.2, 0.3, 0.4], 1, 4),
    ],
)
def test_patience_counts_from_the_best(values, patience, stopped):
    assert follow(values, patience=patience)[1] == stopped


@pytest.mark.parametrize(
    ("metric", "values", "target", "stopped"),
    [("accuracy", [0.1, 0.5, 0.9], 0.5, 2), ("loss", [0.9, 0.5, 0.1], 0.5, 2), ("loss", [0.9, 0.6, 0.1], 0.5, 3)],
)
def test_a_target_is_reached_from_its_own_side(metric, values, target, stopped):
    _, found, reason = follow(values, metric, target=target)
    assert found == stopped
    assert reason in (f"{metric} has reached 0.5", "all epochs done")


def test_time_is_over_after_the_epoch_in_which_it_passed():
    _, stopped, reason = follow([0.1] * 9, max_seconds=25.0)
    assert (stopped, reason) == (3, "25 seconds have passed")


def test_a_resumed_selection_knows_its_best():
    resumed = Selection(Criteria(limit=9, unit="epoch", patience=2), Choice(number=3, metric="accuracy", value=0.8))
    assert not resumed.update(4, {"accuracy": 0.8})
    assert resumed.stop_reason(4, 0.0) is None
    assert not resumed.update(5, {"accuracy": 0.7})
    assert resumed.stop_reason(5, 0.0) == "accuracy has not improved for 2 epochs"
