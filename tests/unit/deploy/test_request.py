from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.deploy.request import KINDS, LARGEST, PROTOCOL, Request

FIELDS = [item.name for item in dataclasses.fields(Request)]

PLAIN = {"protocol": PROTOCOL, "kind": "train", "run": "r1", "experiment": "digits"}

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)
texts = st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=4)
counts = st.integers(0, 2**64)
amounts = st.floats(0, allow_infinity=True, allow_nan=False)

requests = st.builds(
    Request,
    kind=st.sampled_from(KINDS),
    run=names,
    attempt=counts,
    number=counts,
    experiment=names,
    settings=texts,
    digest=st.text(max_size=64),
    clients=st.dictionaries(names, counts, max_size=4),
    seed=counts,
    round=counts,
    rounds=counts,
    proximal=amounts,
    corrected=st.booleans(),
    framework=st.sampled_from(["torch", "numpy"]),
    ties=texts,
    seconds=amounts,
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def brief(error):
    """Asserts that an error does not repeat all that was sent."""
    assert len(str(error)) < 300


@given(requests)
def test_what_is_told_is_heard(request_):
    assert Request.from_json(json.loads(json.dumps(request_.to_json()))) == request_


@given(st.dictionaries(st.sampled_from([*FIELDS, "protocol", "more"]), anything))
def test_whatever_comes_is_a_request_or_refused(told):
    try:
        found = Request.from_json({**PLAIN, **told})
    except ValueError as error:
        brief(error)
    else:
        assert isinstance(found, Request)


@given(anything)
def test_whatever_a_field_is_it_is_taken_or_refused(value):
    for name in FIELDS:
        told = json.loads(json.dumps({**PLAIN, name: value}))
        try:
            found = getattr(Request.from_json(told), name)
        except ValueError:
            continue
        assert type(found) is (float if name in ("proximal", "seconds") else type(value))


WRONG = {
    "another protocol": ({"protocol": 2}, "speaks protocol 2, and this site 1: install the same version"),
    "no protocol": ({"protocol": None}, "speaks protocol None"),
    "an unknown field": ({"colour": 1}, "field 'colour' is unknown"),
    "an unknown kind": ({"kind": "run"}, "kind 'run' is not one of hello, train, evaluate, end"),
    "a path for a run": ({"run": "../x"}, "run '../x' is no name"),
    "a path for an experiment": ({"experiment": "a/b"}, "experiment 'a/b' is no name"),
    "a name that goes on": ({"run": "a\n"}, "is no name"),
    "too long a name": ({"run": "a" * 101}, "is no name"),
    "NaN": ({"proximal": float("nan")}, "proximal is nan, and must be ≥ 0"),
    "a negative number": ({"round": -1}, "round is -1, and must be ≥ 0"),
    "a negative client": ({"clients": {"site-1": -1}}, "counted from 0"),
    "true for a number": ({"round": True}, "field round is True, and must be of kind int"),
    "a fraction": ({"round": 1.0}, "must be of kind int"),
    "a number for a text": ({"digest": 3}, "must be of kind str"),
    "a huge number": ({"seconds": 10**400}, "and too large"),
    "a number in a table of texts": ({"settings": {"lr": 0.1}}, "field settings"),
    "true for a client": ({"clients": {"site-1": True}}, "field clients"),
    "a list for a table": ({"ties": []}, "field ties"),
    "too large a text": ({"digest": "a" * (LARGEST + 1)}, "field digest"),
    "too large a table": ({"ties": {"a": "b" * LARGEST}}, "field ties"),
    "a framework that is none": ({"framework": "jax"}, "neither torch nor numpy"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(kind):
    change, what = WRONG[kind]
    with pytest.raises(ValueError, match=what) as raised:
        Request.from_json({**PLAIN, **change})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("name", ["kind", "run", "experiment"])
def test_what_is_missing_is_said(name):
    with pytest.raises(ValueError, match=f"field {name} is missing"):
        Request.from_json({key: value for key, value in PLAIN.items() if key != name})
