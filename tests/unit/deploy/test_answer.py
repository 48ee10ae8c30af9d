from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_request import anything, brief, names

from shoal.deploy.answer import LARGEST_ERROR, METRICS, Answer
from shoal.deploy.request import PROTOCOL

FIELDS = [item.name for item in dataclasses.fields(Answer)]

answers = st.builds(
    Answer,
    site=st.just("") | names,
    number=st.integers(),
    error=st.text(max_size=50),
    refused=st.booleans(),
    busy=st.booleans(),
    evaluates=st.booleans(),
    examples=st.floats(allow_nan=False, allow_infinity=False),
    metrics=st.dictionaries(st.text(max_size=20), st.floats(), max_size=5),
    tree=st.sampled_from(["", "params", "delta"]),
    seconds=st.floats(0, allow_infinity=False),
)


@given(answers)
def test_what_is_told_is_heard(answer):
    text = json.dumps(answer.to_json(), allow_nan=False)  # which other readers of JSON take, too
    found = Answer.from_json(json.loads(text))
    assert found.metrics.keys() == answer.metrics.keys()
    for name, value in answer.metrics.items():
        assert found.metrics[name] == value or (math.isnan(value) and math.isnan(found.metrics[name]))
    assert dataclasses.replace(found, metrics={}) == dataclasses.replace(answer, metrics={})


@given(st.dictionaries(st.sampled_from([*FIELDS, "protocol", "more"]), anything))
def test_whatever_comes_is_an_answer_or_refused(told):
    try:
        found = Answer.from_json({"protocol": PROTOCOL, **told})
    except ValueError as error:
        brief(error)
        return
    for name, kind in {"site": str, "number": int, "error": str, "refused": bool, "examples": float}.items():
        assert type(getattr(found, name)) is kind
    assert all(type(value) is float for value in found.metrics.values())


WRONG = {
    "another protocol": ({"protocol": 2}, "speaks protocol 2, and this server 1: install the same version"),
    "a path for a name": ({"site": "../x"}, "its name '../x' is none"),
    "no number": ({"number": None}, "its number is None"),
    "an endless number": ({"number": math.inf}, "its number is inf"),
    "an error that is no text": ({"error": {"why": "?"}}, "its error is {'why': '[?]'}, and must be text"),
    "a name that is no text": ({"site": 7}, "its site is 7, and must be text"),
    "too many metrics": ({"metrics": dict.fromkeys(map(str, range(METRICS + 1)), 0.0)}, "metrics"),
    "metrics that are none": ({"metrics": [1]}, "metrics"),
    "a metric that is none": ({"metrics": {"loss": "low"}}, "'low' is no number"),
    "a huge metric": ({"metrics": {"loss": 10**400}}, "is no number"),
    "examples that are none": ({"examples": None}, "None is no number"),
    "arrays of another kind": ({"tree": "gradients"}, "'gradients', and not params or delta"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(kind):
    change, what = WRONG[kind]
    with pytest.raises(ValueError, match=what):
        Answer.from_json({"protocol": PROTOCOL, **change})


@pytest.mark.parametrize("name", ["protocol", "site", "number", "error", "examples", "metrics", "tree"])
def test_what_is_nested_deeply_is_refused(name):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, {"loss": deep}):
        with pytest.raises(ValueError, match=r"nested too deeply|protocol|metrics"):
            Answer.from_json({"protocol": PROTOCOL, name: value})
    with pytest.raises(ValueError, match="nested too deeply"):
        Answer.from_json({"error": deep})


def test_of_a_long_error_the_beginning_is_kept():
    assert Answer.from_json({"protocol": PROTOCOL, "error": "a" * 10**6}).error == "a" * LARGEST_ERROR
