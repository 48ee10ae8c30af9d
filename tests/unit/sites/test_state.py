from __future__ import annotations

from types import SimpleNamespace

import pytest

import shoal
from shoal.processes.table import Standing
from shoal.sites import state as states
from shoal.sites.connection import LEFT
from shoal.sites.state import NEWS, ON_ITS_WAY, PATIENCE, Failure, Reply, SiteState

WAITS = shoal.Deadlines(start=50, reply=100, silence=8, finish=10)
NOW = 1000.0


def rank(**more):
    """Returns a rank's connection, on which all is well."""
    fine = {"pid": 77, "gone": False, "doing": "waiting", "heard": NOW, "changed": NOW, "where": ""}
    return SimpleNamespace(**fine | more)


def site(*ranks, **more):
    """Returns a site with these ranks, or with two on which all is well."""
    there = dict(enumerate(ranks or (rank(), rank())))
    agent = SimpleNamespace(gone=False, pid=76)
    settings = {"site": shoal.Site("a", devices=2), "since": NOW, "agent": agent, "ranks": there} | more
    return SiteState(**settings)


def trouble(state, later=0.0):
    """Returns what is wrong after so many seconds, in words."""
    found = state.trouble(WAITS, NOW + later)
    return None if found is None else found.what


def test_nothing_is_wrong_where_all_is_well():
    assert trouble(site(), later=7) is None
    assert site().ready
    assert trouble(site(task=3), later=7) is None


def test_a_launcher_that_ends_is_told():
    gone = SimpleNamespace(gone=True, pid=76)
    assert trouble(site(agent=gone)) == "its launcher (process 76) has ended"
    assert "its script ended before the federation did" in trouble(site(agent=gone, ended=True))


def test_what_the_launcher_says_comes_before_what_is_seen():
    failure = Failure(what="rank 1 (process 5) ended with exit code 3", rank=1)
    assert site(rank(gone=True), rank(), failure=failure).trouble(WAITS, NOW) is failure


def test_a_rank_that_left_is_to_blame_where_another_fails_for_that():
    failure = Failure(what="rank 0 ended with exit code 1", rank=0, by_others=True)
    found = site(rank(gone=True), rank(doing=LEFT), failure=failure).trouble(WAITS, NOW)
    assert (found.rank, found.what) == (1, "rank 1 (process 77) left its loop over the tasks before they ended")
    own = Failure(what="rank 0 ended with exit code 1", rank=0)
    assert site(rank(), rank(doing=LEFT), failure=own).trouble(WAITS, NOW) is own


@pytest.mark.parametrize(
    ("wrong", "what"), [({"gone": True}, "ended before the federation did"), ({"doing": LEFT}, "left its loop")]
)
def test_the_launcher_has_a_moment_to_tell_how_a_rank_ended(wrong, what):
    state = site(rank(), rank(**wrong))
    assert not state.ready
    assert trouble(state, NEWS - 0.1) is None
    found = state.trouble(WAITS, NOW + NEWS)
    assert found.what.startswith(f"rank 1 (process 77) {what}")
    assert found.rank == 1


def silent(monkeypatch, standings):
    """Makes a rank that is silent, and stands so at the looks that follow."""
    looks = iter(standings)
    monkeypatch.setattr(states, "standing", lambda pid: next(looks))
    return site(rank(heard=NOW + 1000), rank())


def test_a_stopped_rank_is_told_at_once(monkeypatch):
    state = silent(monkeypatch, [Standing("T", 5)])
    assert trouble(state, WAITS.silence) is None
    assert trouble(state, WAITS.silence + 0.1) == "rank 1 (process 77) was stopped, as by SIGSTOP"


def test_a_rank_that_is_gone_is_told_at_once(monkeypatch):
    assert trouble(silent(monkeypatch, [None]), 9) == "rank 1 (process 77) is gone"


def test_a_rank_that_computes_may_be_silent_for_longer(monkeypatch):
    state = silent(monkeypatch, [Standing("R", ticks) for ticks in range(100)])
    for seconds in range(9, int(PATIENCE * WAITS.silence)):
        assert trouble(state, seconds) is None
    assert "has given no sign of life for 40 s" in trouble(state, PATIENCE * WAITS.silence)


def test_so_may_one_that_waits_for_a_core(monkeypatch):
    state = silent(monkeypatch, [Standing("R", 5)] * 100)
    assert [trouble(state, seconds) for seconds in range(9, int(PATIENCE * WAITS.silence))] == [None] * 31
    assert "has given no sign of life for 40 s" in trouble(state, PATIENCE * WAITS.silence)


def test_a_rank_that_does_nothing_may_not(monkeypatch):
    state = silent(monkeypatch, [Standing("S", 5)] * 100)
    assert trouble(state, 9) is None
    assert trouble(state, 10.9) is None
    assert "has given no sign of life for 11 s" in trouble(state, 11)


def test_one_that_is_heard_again_begins_anew(monkeypatch):
    state = silent(monkeypatch, [Standing("S", 5)] * 100)
    assert trouble(state, 9) is None
    state.ranks[1].heard = NOW + 10
    assert trouble(state, 12) is None
    assert trouble(state, 20) is None
    assert trouble(state, 21) is None
    assert trouble(state, 22) is not None


def test_ranks_that_do_not_come_are_told_by_their_numbers():
    state = site(rank(doing="starting"), site=shoal.Site("a", devices=3))
    state.ranks[0].heard = NOW + 50
    assert trouble(state, 50) is None
    assert trouble(state, 50.1) == "rank 0, 1, 2 did not ask for a task within 50 s of its start"
    assert state.trouble(WAITS, NOW + 50.1).silent


def test_a_rank_that_ends_in_a_long_task_is_not_late_to_start():
    state = site(rank(), rank(gone=True), task=2)
    state.since = NOW - 1000
    assert trouble(state, 1) is None
    assert trouble(state, NEWS) == "rank 1 (process 77) ended before the federation did"


def test_a_reply_that_does_not_come_is_told():
    state = site(rank(heard=NOW + 101), rank(heard=NOW + 101, doing=ON_ITS_WAY), task=2)
    assert trouble(state, 100) is None
    found = state.trouble(WAITS, NOW + 101)
    assert (found.what, found.rank, found.silent) == ("gave no reply within 100 s", 1, True)
    state.reply = Reply(task=2, examples=1, metrics={}, tree="", file=None)
    assert trouble(state, 101) is None


def test_a_rank_that_does_not_come_for_the_next_task_is_told():
    state = site(rank(heard=NOW + 201), rank(heard=NOW + 201, doing="task 2"))
    assert not state.idle
    state.expect()
    state.since = NOW + 100
    state.expect()
    assert state.since == NOW + 100
    assert trouble(state, 200) is None
    found = state.trouble(WAITS, NOW + 201)
    assert (found.what, found.rank, found.silent) == ("did not come for its next task within 100 s", 1, True)
    state.ranks[1].doing = "waiting"
    assert state.idle
    state.begin(3)
    assert not state.expected


def test_another_attempt_begins_with_nothing():
    closed = []
    file = SimpleNamespace(close=lambda: closed.append(True))
    state = site(task=2, failure=Failure(what="x"), ended=True)
    state.reply = Reply(task=2, examples=1, metrics={}, tree="params", file=file)
    state.begin_attempt()
    assert (state.attempt, state.ranks, state.ended) == (1, {}, False)
    assert state.reply is state.failure is state.task is None
    assert closed == [True]
    assert state.agent.pid == 76
