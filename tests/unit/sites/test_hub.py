from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

import shoal
import shoal.sites.connection
from process_table import open_files
from shoal.processes.messages import receive, send
from shoal.processes.tensors import write_tensors
from shoal.sites import hub as hubs
from shoal.sites.connection import LEFT
from shoal.sites.hub import Hub
from shoal.sites.state import SiteState


@pytest.fixture
def hub():
    """A hub with a site of two ranks, that has closed everything at the end."""
    before = open_files()
    states = {"a": SiteState(site=shoal.Site("a", devices=2, config={"lr": 0.1}))}
    hub = Hub(states)
    hub.states, hub.callers = states, []
    yield hub
    for caller in hub.callers:
        caller.close()
    hub.close()
    assert not hub.address.folder.exists()
    assert open_files() == before


def poll(hub):
    """Has a hub hear what was said."""
    for _ in range(5):
        hub.poll(0.02)


def call(hub, message=None, **more):
    """Connects with a hub, says who it is, and is heard."""
    caller = hub.address.call(5)
    hub.callers.append(caller)
    caller.settimeout(5)
    hello = {"key": hub.address.key, "site": "a", "attempt": 0, "rank": 0, "ranks": 2} | more
    caller.send(json.dumps(hello).encode() if message is None else message)
    poll(hub)
    return caller


def test_a_rank_is_let_in_and_told(hub):
    caller = call(hub)
    assert receive(caller)[0] == {"welcome": {"config": {"lr": 0.1}}}
    state = hub.states["a"]
    assert state.ranks[0].pid == os.getpid()
    assert not state.present
    call(hub, rank=1)
    assert state.present
    assert not state.ready
    for connection in hub.callers:
        send(connection, {"doing": "waiting", "evaluates": True})
    poll(hub)
    assert state.ready
    assert state.evaluates


def test_a_launcher_is_let_in(hub):
    call(hub, rank=None)
    assert hub.states["a"].agent.pid == os.getpid()


STRANGERS = {
    "no key": {"key": None},
    "another key": {"key": "0" * 64},
    "another site": {"site": "b"},
    "a site that is no name": {"site": ["a"]},
    "an earlier attempt": {"attempt": -1},
    "an attempt that is no number": {"attempt": "x"},
    "a rank that is no number": {"rank": "x"},
    "no ranks": {"message": b'{"key": 1}'},
    "garbage": {"message": b"\xff\xfe"},
    "a number": {"message": b"17"},
    "a list": {"message": b"[]"},
    "deep": {"message": b"[" * 60_000},
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_is_turned_away(hub, kind):
    caller = call(hub, **STRANGERS[kind])
    assert receive(caller) is None
    state = hub.states["a"]
    assert (state.ranks, state.agent, state.failure) == ({}, None, None)


def test_another_user_is_turned_away(hub, monkeypatch):
    monkeypatch.setattr(shoal.sites.connection, "credentials", lambda stream: (os.getpid(), os.getuid() + 1))
    caller = hub.address.call(5)
    hub.callers.append(caller)
    poll(hub)
    assert receive(caller) is None


def test_who_says_nothing_is_turned_away(hub, monkeypatch):
    monkeypatch.setattr(hubs, "INTRODUCTION", 0.1)
    caller = hub.address.call(5)
    hub.callers.append(caller)
    poll(hub)
    time.sleep(0.15)
    poll(hub)
    assert receive(caller) is None


@pytest.mark.parametrize("rank", [0, None])
def test_a_second_one_is_turned_away(hub, rank):
    first, second = call(hub, rank=rank), call(hub, rank=rank)
    if rank == 0:
        assert receive(first) is not None
    assert receive(second) is None
    assert hub.states["a"].failure is None


@pytest.mark.parametrize("wrong", [{"rank": 2}, {"rank": -1}, {"ranks": 3}])
def test_a_rank_of_another_launch_is_told(hub, wrong):
    call(hub, **wrong)
    assert "let the site's launcher start the ranks" in hub.states["a"].failure.what


def reply(hub, caller, arrays=None, fd=None, **more):
    """Answers a task."""
    told = {"task": 3, "examples": 2, "metrics": {"loss": 1}, "tree": "params" if arrays or fd else ""} | more
    fd = write_tensors(arrays) if arrays else fd
    send(caller, {"reply": told}, fd)
    if fd is not None:
        os.close(fd)
    poll(hub)


def test_a_reply_is_kept_until_it_is_taken(hub):
    caller, state = call(hub), hub.states["a"]
    state.task = 3
    reply(hub, caller, {"w": np.arange(3.0)})
    assert (state.reply.examples, state.reply.metrics) == (2.0, {"loss": 1.0})
    np.testing.assert_array_equal(state.reply.file.read("w"), np.arange(3.0))
    state.drop_reply()
    assert state.reply is None


def test_a_reply_to_another_task_is_thrown_away(hub):
    caller, state = call(hub), hub.states["a"]
    state.task = 4
    reply(hub, caller, {"w": np.arange(3.0)})
    assert state.reply is None
    assert state.failure is None


@pytest.mark.parametrize("examples", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_told(hub, examples):
    caller, state = call(hub), hub.states["a"]
    state.task = 3
    reply(hub, caller, {"w": np.zeros(1)}, examples=examples)
    assert "examples, and must have more than 0" in state.failure.what
    state.drop_reply()


ARRAYS = {"w": np.zeros(2)}

WRONG = [{"examples": "x"}, {"examples": None}, {"metrics": 3}, {"metrics": {"a": "b"}}]


@pytest.mark.parametrize(
    ("wrong", "arrays"),
    [({"tree": "params"}, None), ({"tree": ""}, ARRAYS), *((wrong, ARRAYS) for wrong in WRONG), ({"metrics": 3}, None)],
)
def test_a_reply_that_makes_no_sense_is_the_sites_failure(hub, wrong, arrays):
    """And what it sends along is closed."""
    caller, state = call(hub), hub.states["a"]
    state.task = 3
    reply(hub, caller, arrays, **wrong)
    assert "said what makes no sense" in state.failure.what


def test_memory_that_holds_no_arrays_is_the_sites_failure(hub):
    caller, state = call(hub), hub.states["a"]
    state.task = 3
    reading, writing = os.pipe()
    os.close(writing)
    reply(hub, caller, fd=reading)
    assert state.failure is not None
    assert state.reply is None


def test_files_that_nobody_asked_for_are_closed(hub):
    caller = call(hub)
    before = open_files()
    for message in ({"doing": "waiting"}, {"where": "x:1"}, {"else": 1}):
        send(caller, message, caller.fileno())
    poll(hub)
    assert open_files() == before


def test_a_connection_that_ends_is_noticed(hub):
    caller = call(hub)
    send(caller, {"doing": LEFT})
    caller.close()
    poll(hub)
    connection = hub.states["a"].ranks[0]
    assert connection.gone
    assert connection.doing == LEFT


def test_a_launcher_tells_of_its_own_attempt_alone(hub):
    caller, state = call(hub, rank=None), hub.states["a"]
    state.attempt = 1
    failed = {"rank": 1, "what": "rank 1 ended", "lines": ["a"], "by_others": True}
    send(caller, {"failed": failed, "attempt": 0})
    poll(hub)
    assert state.failure is None
    send(caller, {"failed": failed, "attempt": 1})
    send(caller, {"ended": True, "attempt": 1})
    poll(hub)
    assert (state.failure.rank, state.failure.lines, state.failure.by_others) == (1, ("a",), True)
    assert state.ended


def test_the_time_to_start_is_counted_from_the_launch(hub):
    """The ranks of the attempt before may have taken their time to end."""
    caller, state = call(hub, rank=None), hub.states["a"]
    state.attempt, state.since = 1, 0.0
    send(caller, {"launching": True, "attempt": 0})
    poll(hub)
    assert state.since == 0.0
    before = time.monotonic()
    send(caller, {"launching": True, "attempt": 1})
    poll(hub)
    assert before <= state.since <= time.monotonic()


def test_what_waits_is_sent_when_the_other_end_takes_it(hub):
    caller = call(hub)
    connection = hub.states["a"].ranks[0]
    for number in range(2000):
        connection.post({"number": number, "more": "x" * 500})
    heard = []
    while len(heard) < 2001:
        heard.append(receive(caller)[0])
        hub.poll(0)
    assert [message.get("number") for message in heard] == [None, *range(2000)]
