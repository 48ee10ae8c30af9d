from __future__ import annotations

import pytest

from shoal.deploy import roster as module
from shoal.deploy.answer import Answer
from shoal.deploy.parcel import Parcel
from shoal.deploy.request import Request
from shoal.deploy.roster import Roster, in_order
from shoal.errors import ConfigurationError, EngineError


class Wire:
    """Notes down what is sent; what comes back is the test's to say."""

    name = "test"

    def __init__(self):
        self.there = []
        self.sent = {}
        self.forgotten = []
        self._count = 0

    def present(self):
        return list(self.there)

    def send(self, to, parcel):
        tickets = {}
        for address in to:
            self._count += 1
            tickets[address] = self.sent[address] = f"t{self._count}"
        return tickets

    def forget(self, tickets):
        self.forgotten += tickets


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def looked(wire, clock):
    """Returns a roster, and what lets it look at who is there."""

    def make(names=("site-1", "site-2")):
        roster = Roster(wire, Request(kind="hello", run="r", experiment="e").to_json(), names)

        def look(*there, passed=2.0):
            clock.now += passed
            wire.there = list(there)
            roster.look()

        return roster, look

    return make


def said(name="", **more):
    return Parcel(meta=Answer(site=name, **more).to_json())


def test_each_address_is_asked_once(looked, wire):
    roster, look = looked()
    look("a", "b")
    first = dict(wire.sent)
    assert first.keys() == {"a", "b"}
    assert roster.take(first["a"], said("site-1"))
    assert not roster.take("another", said("site-2"))
    assert roster.present == ["site-1"]
    look("a", "b")
    assert wire.sent == first
    look("a", "b", passed=module.AGAIN)  # b gave no name
    assert wire.sent["b"] != first["b"]
    assert wire.forgotten == [first["b"]]
    assert not roster.take(first["b"], said("site-2"))
    assert roster.take(wire.sent["b"], said("site-2"))
    assert roster.present == ["site-1", "site-2"]


def test_who_goes_and_comes_back_is_known(looked, wire):
    roster, look = looked()
    look("a")
    roster.take(wire.sent["a"], said("site-1"))
    look()
    assert roster.present == []
    assert roster.members["site-1"].since > 1000
    look("c")
    roster.take(wire.sent["c"], said("site-1"))
    assert roster.members["site-1"].address == "c"


def test_one_that_goes_before_it_answers_is_forgotten(looked, wire):
    roster, look = looked()
    look("a")
    look()
    assert wire.forgotten == [wire.sent["a"]]
    assert not roster.take(wire.sent["a"], said("site-1"))


@pytest.mark.parametrize("answer", [EngineError("lost"), said("site-1", error="not now")])
def test_one_that_gives_no_name_is_asked_again(looked, wire, answer):
    roster, look = looked()
    look("a")
    first = wire.sent["a"]
    assert roster.take(first, answer)
    assert roster.present == []
    look("a", passed=module.AGAIN + 1)
    assert wire.sent["a"] != first


def test_sites_that_have_no_part_are_left_alone(looked, wire):
    roster, look = looked()
    for name, answer in (("a", said("site-9")), ("b", said("site-8", error="no", refused=True))):
        look(name)
        first = wire.sent[name]
        assert roster.take(first, answer)
        look(name, passed=100)
        assert wire.sent[name] == first
    assert roster.present == []


WRONG = {
    "a refusal": (said("site-1", error="not allowed", refused=True), "site-1 refuses: not allowed"),
    "another protocol": (Parcel(meta={**said("site-1").meta, "protocol": 2}), "the site speaks protocol 2"),
    "garbage": (Parcel(meta={"protocol": 1, "number": "x"}), "what a answers cannot be read: its number is 'x'"),
    "no name": (said(), "a says no name of a site"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_stops_a_federation_that_has_not_begun(looked, wire, kind):
    answer, what = WRONG[kind]
    roster, look = looked()
    look("a")
    with pytest.raises(ConfigurationError, match=what):
        roster.take(wire.sent["a"], answer)


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_does_not_disturb_one_that_has_begun(looked, wire, kind):
    roster, look = looked(None)
    look("a", "b")
    roster.take(wire.sent["b"], said("site-1"))
    roster.begin(["site-1"])
    assert roster.take(wire.sent["a"], WRONG[kind][0])
    before = dict(wire.sent)
    look("a", "b", passed=100)
    assert wire.sent == before
    assert roster.present == ["site-1"]


def test_two_of_one_name_are_told_apart(looked, wire):
    roster, look = looked()
    look("a", "b")
    roster.take(wire.sent["a"], said("site-1"))
    with pytest.raises(ConfigurationError, match="two sites are called site-1: give each a name of its own"):
        roster.take(wire.sent["b"], said("site-1"))


def test_a_site_may_come_back_before_it_is_seen_to_be_gone(looked, wire):
    """Its client has a new address, and the old one is there for a while."""
    roster, look = looked()
    look("a")
    roster.take(wire.sent["a"], said("site-1"))
    roster.begin(["site-1", "site-2"])
    look("a", "b")
    roster.take(wire.sent["b"], said("site-1"))
    assert roster.members["site-1"].address == "a"
    look("b", passed=module.AGAIN + 1)
    assert roster.members["site-1"].address is None
    roster.take(wire.sent["b"], said("site-1"))
    assert roster.members["site-1"].address == "b"


def test_sites_without_names_are_counted_until_it_begins(looked, wire):
    roster, look = looked(None)
    look("a")
    roster.take(wire.sent["a"], said("hospital"))
    roster.begin(["hospital"])
    look("a", "b")
    roster.take(wire.sent["b"], said("stranger"))
    assert list(roster.members) == ["hospital"]


def test_names_are_in_the_order_that_a_reader_expects():
    assert in_order(["site-10", "b", "site-2", "a1b", "a"]) == ["a", "a1b", "b", "site-2", "site-10"]
    assert in_order(["1", "a", "2b", "10"]) == ["1", "2b", "10", "a"]
