from __future__ import annotations

import pytest

from shoal.deploy import asking as module
from shoal.deploy.answer import Answer
from shoal.deploy.asking import Asking
from shoal.deploy.parcel import Parcel
from shoal.errors import ClientError, ConfigurationError, EngineError, SiteError
from shoal.sites.policy import SitePolicy
from shoal.sites.state import Deadlines


class Member:
    def __init__(self, address):
        self.address, self.since, self.failures = address, 0.0, 0


class Roster:
    """Everybody is there, unless the test says otherwise."""

    def __init__(self, names):
        self.members = {name: Member(name) for name in names}
        self.taken = []

    def look(self):
        pass

    def take(self, ticket, answer):
        self.taken.append(ticket)


class World:
    """A wire and a clock: a script says what each message is answered with, and each wait is as long as it may be.

    Args:
        script: What each site answers to its first message, its second and so on; None is silence.
    """

    name = "test"

    def __init__(self, monkeypatch, script):
        self.now = 1000.0
        self.script = {name: list(answers) for name, answers in script.items()}
        self.roster = Roster(script)
        self.sent = {name: [] for name in script}
        self.forgotten = set()
        self._waiting = []
        self._count = 0
        monkeypatch.setattr(module, "time", self)

    def monotonic(self):
        return self.now

    def send(self, to, parcel):
        tickets = {}
        for address in to:
            self._count += 1
            tickets[address] = f"t{self._count}"
            self.sent[address].append(self.now - 1000)
            answer = self.script[address].pop(0) if self.script[address] else None
            if callable(answer):
                answer = answer(self)
            if answer is not None:
                self._waiting.append((tickets[address], answer))
        return tickets

    def receive(self, seconds):
        if not self._waiting:
            self.now += seconds
        while self._waiting:
            yield self._waiting.pop(0)

    def forget(self, tickets):
        self.forgotten.update(tickets)

    def ask(self, *, kind="train", within=600.0, lenient=False, **policy):
        """Returns what became of each site."""
        policy = SitePolicy(waits=Deadlines(start=100), **policy)
        names = {name: client for client, name in enumerate(self.script)}
        asking = Asking(self, self.roster, Parcel(meta={"kind": kind}), names, 7, policy, within, lenient)
        return {client: problem if answer is None else "done" for client, answer, problem in asking.answers()}


@pytest.fixture
def world(monkeypatch):
    return lambda **script: World(monkeypatch, script)


def said(**more):
    return Parcel(meta=Answer(site="a", **{"number": 7, **more}).to_json())


LOST = EngineError("lost on the way")


def test_all_that_answer_are_done(world):
    made = world(a=[said()], b=[said()])
    assert made.ask() == {0: "done", 1: "done"}
    assert made.sent == {"a": [0.0], "b": [0.0]}


def test_silence_is_asked_again_after_ever_longer_times(world):
    made = world(a=[None, None, None, said()])
    assert made.ask() == {0: "done"}
    assert [round(at / 60) for at in made.sent["a"]] == [0, 1, 3, 7]
    assert made.forgotten == {"t1", "t2", "t3"}


def test_what_is_lost_is_asked_again_soon(world):
    made = world(a=[LOST, said()])
    assert made.ask() == {0: "done"}
    assert made.sent["a"][1] == pytest.approx(module.BUSY, abs=1)


def test_who_is_busy_is_asked_again(world):
    made = world(a=[said(busy=True, error="works for run r2"), said()])
    assert made.ask() == {0: "done"}


@pytest.mark.parametrize("first", [said(busy=True, error="works for run r2"), Parcel(meta={"error": "away"}), LOST])
def test_silence_after_an_answer_is_not_waited_for_longer(world, first):
    made = world(a=[first] * 5 + [None, said()])
    assert made.ask(lenient=True, min_sites=2) == {0: "done"}
    assert made.sent["a"][6] - made.sent["a"][5] == pytest.approx(module.AGAIN, abs=1)


def test_an_answer_to_another_task_is_none(world):
    made = world(a=[said(number=6), said()])
    assert made.ask() == {0: "done"}


def test_a_site_that_comes_back_elsewhere_is_asked_there(world):
    def moves(made):
        made.roster.members["a"].address = "b"

    made = world(a=[moves], b=[said(), said()])
    assert made.ask()[0] == "done"
    assert made.sent["b"][-1] < 2


def test_what_others_answer_is_the_rosters(world):
    made = world(a=[said()])
    made._waiting.append(("hello", said()))
    made.ask()
    assert made.roster.taken == ["hello"]


STOPS = {
    "refused": ([said(refused=True, error="not here")], SiteError, "^a refuses: not here$"),
    "failed": ([said(error="a: rank 1 was killed")], SiteError, "^a: rank 1 was killed$"),
    "garbage": ([Parcel(meta={"protocol": 1, "number": []})], SiteError, r"^a: its answer cannot be read: its number"),
    "protocol": ([Parcel(meta={"protocol": 2})], SiteError, "^a: its answer .*: the site speaks protocol 2"),
    "silent": ([None] * 9, SiteError, "^a gave no answer within 600 s$"),
    "busy": (
        [said(busy=True, error="works for run r2")] * 99, SiteError,
        "^a gave no answer within 600 s; last was said: works for run r2$",
    ),
    "unreachable": (
        [LOST] * 99, SiteError, "^a is gone, and did not come back within 100 s; last was said: lost on the way$"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", STOPS)
def test_what_stops_a_run_is_said(world, kind):
    answers, error, what = STOPS[kind]
    made = world(a=answers, b=[said()])
    with pytest.raises(error, match=what):
        made.ask()
    assert made.now - 1000 < 720  # and no later


@pytest.mark.parametrize("kind", STOPS)
def test_what_stops_no_run_leaves_the_site_out(world, kind):
    answers, error, what = STOPS[kind]
    found = world(a=answers, b=[said()]).ask(on_failure="continue", lenient=True, min_sites=2)
    assert found[1] == "done"
    assert isinstance(found[0], error)
    with pytest.raises(error, match=what):
        raise found[0]


@pytest.mark.parametrize("policy", [{}, {"on_failure": "continue", "lenient": True}, {"on_failure": "restart"}])
def test_who_refuses_to_begin_ends_the_run(world, policy):
    with pytest.raises(ConfigurationError, match="^a refuses: not here$"):
        world(a=[said(refused=True, error="not here"), said()], b=[said()]).ask(kind="hello", **policy)


@pytest.mark.parametrize("kind", ["train", "evaluate", "end"])
def test_who_refuses_later_is_not_asked_again(world, kind):
    made = world(a=[said(refused=True, error="not here"), said()], b=[said()])
    with pytest.raises(SiteError, match="^a refuses: not here$"):
        made.ask(kind=kind, on_failure="restart", max_restarts=9)
    assert len(made.sent["a"]) == 1
    made = world(a=[said(refused=True, error="not here"), said()], b=[None, said()])
    found = made.ask(kind=kind, on_failure="continue", lenient=True, min_sites=1)
    assert str(found[0]) == "a refuses: not here"
    assert found[1] == "done"
    assert len(made.sent["a"]) == 1


def test_a_site_that_fails_is_asked_again_as_often_as_the_policy_says(world):
    assert world(a=[said(error="no"), said()]).ask(on_failure="restart") == {0: "done"}
    with pytest.raises(SiteError, match="no"):
        world(a=[said(error="no"), said(error="no"), said()]).ask(on_failure="restart")
    twice = world(a=[said(error="no"), said(), said(error="no")])
    assert twice.ask(on_failure="restart") == {0: "done"}
    with pytest.raises(SiteError, match="no"):  # of a run, not of each round
        twice.ask(on_failure="restart")
    found = world(a=[said(error="no"), said(error="no"), said()]).ask(on_failure="restart", max_restarts=2)
    assert found == {0: "done"}


def test_who_is_late_is_left_out_once_enough_have_answered(world):
    made = world(a=[None] * 9, b=[said()])
    found = made.ask(lenient=True, min_sites=1, deadline=5.0)
    assert isinstance(found[0], ClientError)
    assert str(found[0]) == "no reply within 5 s; what it sends later is thrown away"
    assert made.now - 1000 < 7
    assert "t1" in made.forgotten


def test_who_is_gone_is_left_out_once_enough_have_answered(world):
    made = world(a=[None], b=[said()])
    made.roster.members["a"].address = None
    found = made.ask(lenient=True, min_sites=1)
    assert str(found[0]) == "it is gone; what it sends later is thrown away"
    assert made.sent["a"] == []


def test_one_lost_message_leaves_nobody_out(world):
    made = world(a=[LOST, said()], b=[said()])
    assert made.ask(lenient=True, min_sites=1) == {0: "done", 1: "done"}
    made = world(a=[LOST, LOST, said()], b=[said()])
    assert str(made.ask(lenient=True, min_sites=1)[0]).startswith("it is gone")


def test_who_is_gone_may_come_back_for_a_while(world):
    def come(made):
        made.roster.members["a"].address = "a"
        return said()

    made = world(a=[said()], b=[said()])
    made.roster.members["a"].address = None
    made.roster.look = lambda: come(made) if made.now > 1090 else None
    assert made.ask() == {0: "done", 1: "done"}
    made = world(a=[said()], b=[said()])
    made.roster.members["a"].address = None
    with pytest.raises(SiteError, match="^a is gone, and did not come back within 100 s$"):
        made.ask()


def test_a_wire_that_is_gone_ends_it(world):
    made = world(a=[None])

    def gone(seconds):
        raise EngineError("the server of the engine is gone")
        yield

    made.receive = gone
    with pytest.raises(EngineError, match="the server of the engine is gone"):
        made.ask()
    assert made.forgotten == {"t1"}
