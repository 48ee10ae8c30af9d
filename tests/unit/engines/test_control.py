"""How workers talk, over real sockets: both ends in this process, or one of them misbehaving by hand."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import threading
import time

import pytest

from shoal.engines import control as control_module
from shoal.engines import reception as reception_module
from shoal.engines.accounts import end_of, told
from shoal.engines.control import Control, Peer, frame
from shoal.engines.reception import Reception, call_on, introduction
from shoal.errors import ClientError, ConfigurationError, RunInterrupted, Terminated, WorkerError

SOON = 10.0


@pytest.fixture
def quick(monkeypatch):
    """Signs of life, and patience with those who give none, at a pace for tests."""
    monkeypatch.setattr(control_module, "BEAT", 0.1)
    monkeypatch.setattr(control_module, "SILENCE", 0.8)
    monkeypatch.setattr(control_module, "NOTICE", 0.1)


@contextlib.contextmanager
def closing(*controls):
    try:
        yield controls
    finally:
        for one in controls:
            one.close()


@contextlib.contextmanager
def team(workers=2):
    """Yields the leader's control and the others'."""
    with Reception("127.0.0.1", workers - 1) as reception:
        where = {"port": reception.port, "password": reception.password, **introduction()}
        others = [call_on(where, "127.0.0.1", rank, time.monotonic() + SOON) for rank in range(1, workers)]
        leader = Control()
        with closing(leader, *others):
            reception.receive(leader, time.monotonic() + SOON)
            yield leader, *others


@contextlib.contextmanager
def by_hand(workers=2):
    """Yields a control and the bare other ends of its connections."""
    with closing(Control()) as (control,), contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        others = []
        for rank in range(1, workers):
            others.append(stack.enter_context(socket.create_connection(listener.getsockname(), timeout=SOON)))
            control.admit(rank, Peer(listener.accept()[0], f"worker {rank}"))
        yield control, *others


@contextlib.contextmanager
def living(end):
    """Sends signs of life."""
    stop = threading.Event()

    def live():
        while not stop.wait(0.1):
            with contextlib.suppress(OSError):
                end.send(control_module.SIGN_OF_LIFE)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def end_within(control, seconds=SOON):
    """Waits for the end of a peer, and raises what it means."""
    control.wait_for_an_end(seconds)
    control.watch()
    raise AssertionError("no end was noted")


def test_messages_come_in_order_and_by_rank():
    with team(4) as (leader, *others):
        for rank, other in reversed(list(enumerate(others, 1))):
            other.tell({"done": [rank, "first"]})
            other.tell({"done": [rank, "second"]})
        for word in ("first", "second"):
            assert leader.gather("done") == {rank: [rank, word] for rank in (1, 2, 3)}
        leader.tell({"sum": {"x": 0.1}})
        assert [other.gather("sum") for other in others] == [{0: {"x": 0.1}}] * 3


def test_a_control_without_peers_waits_for_nobody():
    with closing(Control()) as (alone,):
        alone.tell({"next": 1})
        assert alone.gather("done") == {}
        alone.watch()


def test_a_message_of_many_megabytes_comes_whole_while_both_ends_send_one():
    with team() as (leader, other):
        leader.tell({"sum": "x" * 30_000_000})
        other.tell({"done": "y" * 30_000_000})
        assert leader.gather("done")[1] == "y" * 30_000_000
        assert other.gather("sum")[0] == "x" * 30_000_000


def test_numbers_are_told_exactly():
    numbers = [0.1, 1e-300, 2.0**53 + 1, -0.0, float("inf")]
    with team() as (leader, other):
        leader.tell({"next": numbers})
        assert other.gather("next")[0] == numbers


def test_another_kind_of_message_than_was_due_is_a_fault():
    with team() as (leader, other):
        other.tell({"about": 1})
        with pytest.raises(WorkerError, match="worker 1 .* said about where done was due: do all run the same shoal"):
            leader.gather("done")


def test_a_closed_connection_is_an_end_at_once():
    with team(3) as (leader, first, second):
        first.close()
        began = time.monotonic()
        with pytest.raises(WorkerError, match="worker 1 .process .* is gone: its process or its machine has ended"):
            leader.gather("done")
        assert time.monotonic() - began < 2
        assert second.watch() is None  # it hears of it from the leader alone


def test_what_came_before_the_end_of_a_connection_is_not_lost():
    with team() as (leader, other):
        other.tell({"done": 1})
        other.close()
        leader.wait_for_an_end(SOON)
        assert leader.gather("done") == {1: 1}
        with pytest.raises(WorkerError, match="is gone"):
            leader.gather("done")


def test_a_worker_at_its_work_is_alive(quick):
    with team() as (leader, other):
        for _ in range(20):  # no gather, no watch: more than twice the silence that would be death
            time.sleep(0.1)
        assert leader.watch() is other.watch() is None


def test_a_silent_peer_is_given_up(quick):
    with by_hand() as (control, _):
        began = time.monotonic()
        with pytest.raises(WorkerError, match="worker 1 is gone: no sign of life for 1 seconds"):
            end_within(control)
        assert 0.7 < time.monotonic() - began < 3


def test_a_peer_that_lives_but_never_reads_is_given_up(quick):
    with by_hand() as (control, other):
        control.tell({"sum": "x" * 20_000_000})  # more than the system keeps for it
        with living(other), pytest.raises(WorkerError, match="it has read nothing for 1 seconds"):
            end_within(control)


def test_one_peer_that_does_not_read_costs_the_others_no_sign_of_life(quick):
    with by_hand(3) as (control, deaf, other):
        control.tell({"sum": "x" * 20_000_000})
        other.settimeout(0.5)
        with living(deaf), living(other):
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                assert other.recv(1 << 20)  # in time, or there is a TimeoutError


def test_who_was_suspended_does_not_take_the_others_for_dead(quick, monkeypatch):
    with team() as (leader, other):
        clock = time.monotonic
        ahead = 0.0
        monkeypatch.setattr(control_module.time, "monotonic", lambda: clock() + ahead)
        time.sleep(0.3)
        ahead = 100.0  # as for a process that was stopped, whose clock went on
        time.sleep(0.5)
        assert leader.watch() is other.watch() is None


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!I", (1 << 28) + 1) + b"x",
        struct.pack("!I", 4) + b"\xff\xfe{}",
        struct.pack("!I", 8000) + b"[" * 8000,
        frame({"x": 1})[:4] + b"[1, 2, 3",
        struct.pack("!I", 9) + b"[1, 2, 3]",
        struct.pack("!I", 2) + b"42",
    ],
    ids=["http", "oversized", "no text", "deep", "no JSON", "a list", "a number"],
)
def test_what_is_no_message_ends_the_connection(said):
    with by_hand() as (control, other):
        other.send(said)
        with pytest.raises(WorkerError, match="worker 1 is gone"):
            end_within(control)


def test_a_truncated_message_is_no_message():
    with by_hand() as (control, other):
        other.send(frame({"done": 1}) + frame({"done": 2})[:-1])
        other.close()
        assert control.gather("done") == {1: 1}
        with pytest.raises(WorkerError, match="is gone"):
            control.gather("done")


def test_a_message_may_come_byte_by_byte():
    with by_hand() as (control, other):
        for byte in control_module.SIGN_OF_LIFE + frame({"done": "ä"}):
            other.send(bytes([byte]))
            time.sleep(0.002)
        assert control.gather("done") == {1: "ä"}


def raised(error, cause=None):
    error.__cause__ = error.__cause__ or cause
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ZeroDivisionError("x"), WorkerError, "worker 1 failed: ZeroDivisionError: x"),
        (ClientError("client 2 failed"), WorkerError, "worker 1 failed: client 2 failed"),
        (ConfigurationError("no such file"), ConfigurationError, "worker 1: no such file"),
        (KeyboardInterrupt(), KeyboardInterrupt, "worker 1 was interrupted"),
        (Terminated(), Terminated, "worker 1 was ended by SIGTERM"),
        (raised(RunInterrupted("saved"), Terminated()), Terminated, "worker 1 was ended by SIGTERM"),
        (SystemExit(3), WorkerError, "worker 1 failed: SystemExit: 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_end_is_told_with_what_it_means(error, kind, message):
    with team() as (leader, other):
        other.tell({"done": 1})
        other.tell({"ended": told(raised(error))})
        other.close()
        leader.wait_for_an_end(SOON)
        assert leader.gather("done") == {1: 1}  # what it did before counts
        with pytest.raises(kind) as caught:
            leader.gather("done")
        assert type(caught.value) is kind
        assert message.removeprefix("worker 1") in str(caught.value)
        assert leader.told_by == 1
        trace = "".join(getattr(caught.value, "__notes__", []))
        assert ("Traceback" in trace and "in raised" in trace) == (kind is WorkerError)


def test_an_account_is_json():
    account = json.loads(json.dumps(told(raised(ZeroDivisionError("x")))))
    assert str(end_of("worker 7", account)) == "worker 7 failed: ZeroDivisionError: x"


def test_an_end_that_was_read_and_not_yet_judged_is_no_message_to_who_waits():
    with team() as (leader, _), leader._changed:  # as between the thread's two looks
        leader._peers[1].inbox.append({"ended": told(raised(ZeroDivisionError("x")))})
        with pytest.raises(WorkerError, match="ZeroDivisionError"):
            leader.gather("about")


def test_the_first_end_counts_but_an_interruption_gives_way_to_a_death():
    with team(4) as (leader, first, second, third):
        first.tell({"ended": told(KeyboardInterrupt())})
        leader.wait_for_an_end(SOON)
        second.tell({"ended": told(ZeroDivisionError("a consequence"))})
        time.sleep(0.2)
        with pytest.raises(KeyboardInterrupt, match="worker 1 .* was interrupted"):
            leader.watch()
        interrupt = KeyboardInterrupt()
        assert leader.cause(interrupt, 0.1) is interrupt
        third.close()  # what the launcher has seen, who then interrupted the others
        assert "worker 3 " in str(leader.cause(interrupt, SOON))
        error = ValueError()
        assert leader.cause(error, SOON) is error
        second.close()
        time.sleep(0.2)
        with pytest.raises(WorkerError, match="worker 3 .* is gone"):
            leader.watch()


def test_all_have_left_when_all_are_closed():
    with team(3) as (leader, first, second):
        first.close()
        began = time.monotonic()
        leader.wait_for_all_to_leave(0.3)
        assert time.monotonic() - began >= 0.3
        threading.Timer(0.2, second.close).start()
        leader.wait_for_all_to_leave(SOON)
        assert time.monotonic() - began < 5


class TestAlarm:
    def test_it_interrupts_whatever_the_main_thread_does(self, quick):
        with team() as (leader, other):
            leader.arm()
            threading.Timer(0.2, other.tell, [{"ended": told(ZeroDivisionError("x"))}]).start()
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt, match="failed: ZeroDivisionError: x"):
                time.sleep(SOON)
            leader.disarm()
            assert time.monotonic() - began < 3
            assert isinstance(leader.cause(KeyboardInterrupt(), 0), WorkerError)

    def test_it_comes_again_where_it_was_swallowed(self, quick):
        with team() as (leader, other):
            leader.arm()
            other.close()
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt, match="is gone"):
                    time.sleep(SOON)
            leader.disarm()

    def test_an_interrupted_worker_interrupts_as_it_was(self, quick):
        with team() as (leader, other):
            leader.arm()
            other.tell({"ended": told(Terminated())})
            with pytest.raises(Terminated):
                time.sleep(SOON)
            leader.disarm()

    def test_it_is_silent_where_the_end_was_noticed_or_nobody_set_it(self, quick):
        with team() as (leader, other):
            other.close()
            time.sleep(0.5)
            leader.arm()
            with pytest.raises(WorkerError):
                leader.watch()
            time.sleep(0.5)
            leader.disarm()

    def test_the_signals_handler_is_given_back(self):
        before = signal.getsignal(control_module.ALARM)
        with team() as (leader, _):
            leader.arm()
            leader.arm()
            assert signal.getsignal(control_module.ALARM) != before
            leader.disarm()
            leader.disarm()
        assert signal.getsignal(control_module.ALARM) == before

    def test_outside_the_main_thread_there_is_none(self):
        with team() as (leader, _):
            thread = threading.Thread(target=leader.arm)
            thread.start()
            thread.join()
            assert signal.getsignal(control_module.ALARM) == signal.SIG_DFL


@contextlib.contextmanager
def waiting(others=1, seconds=SOON):
    """Yields a reception, and a function that tells what came of waiting there."""
    with Reception("127.0.0.1", others) as reception:
        control, outcome = Control(), []

        def receive():
            try:
                reception.receive(control, time.monotonic() + seconds)
                outcome.append(control.ranks)
            except WorkerError as error:
                outcome.append(error)

        thread = threading.Thread(target=receive)
        thread.start()

        def came():
            thread.join(SOON + seconds)
            return outcome[0]

        with closing(control):
            yield reception, came


def connected(reception):
    return socket.create_connection(("127.0.0.1", reception.port), timeout=SOON)


def hello(reception, rank=1, **more):
    return frame({"password": reception.password, "rank": rank, "process": 1, "host": "there"} | more)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        frame({"password": "x" * 32, "rank": 1}),
        frame({"password": "ä", "rank": 1}),
        frame({"password": None}),
        frame({}),
        struct.pack("!I", 9) + b"[1, 2, 3]",
        struct.pack("!I", 4000) + b"[" * 4000,
        struct.pack("!I", 5000),
        b"",
    ],
    ids=["http", "wrong", "no ascii", "null", "none", "a list", "deep", "oversized", "nothing"],
)
def test_strangers_are_sent_away_and_the_worker_is_taken_in(said):
    with waiting() as (reception, came), connected(reception) as stranger:
        stranger.send(said)
        if not said:
            stranger.close()
        where = {"port": reception.port, "password": reception.password, **introduction()}
        with closing(call_on(where, "127.0.0.1", 1, time.monotonic() + SOON)):
            assert came() == {1}


def test_somebody_who_says_nothing_keeps_nobody_waiting():
    with waiting() as (reception, came), contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connected(reception))
        began = time.monotonic()
        worker = stack.enter_context(connected(reception))
        worker.send(hello(reception))
        assert came() == {1}
        assert time.monotonic() - began < 2


def test_somebody_who_says_nothing_is_sent_away(monkeypatch):
    monkeypatch.setattr(reception_module, "PATIENCE", 0.2)
    with waiting(seconds=3) as (reception, came):
        with connected(reception) as stranger:
            assert stranger.recv(1) == b""
        with connected(reception) as worker:
            worker.send(hello(reception))
            assert came() == {1}


def test_a_crowd_of_strangers_leaves_room_for_a_worker(monkeypatch):
    with waiting() as (reception, came), contextlib.ExitStack() as stack:
        monkeypatch.setattr(reception_module, "CROWD", 5)
        for _ in range(30):
            stack.enter_context(connected(reception))
        worker = stack.enter_context(connected(reception))
        worker.send(hello(reception))
        assert came() == {1}


def test_who_has_not_come_in_time_is_named():
    with waiting(others=3, seconds=0.5) as (reception, came), connected(reception) as worker:
        worker.send(hello(reception, rank=2))
        assert str(came()) == "of 4 workers 2 did not come in time: 1, 3"


@pytest.mark.parametrize("rank", [1, 0, 3, -1])
def test_a_rank_that_is_taken_or_does_not_exist_is_refused(rank):
    with waiting(others=2) as (reception, came), connected(reception) as first, connected(reception) as second:
        first.send(hello(reception, rank=1))
        second.send(hello(reception, rank=rank))
        assert "start each with its own RANK" in str(came())


def test_a_worker_that_ends_while_others_are_awaited_ends_the_wait(monkeypatch):
    monkeypatch.setattr(reception_module, "PATIENCE", 0.5)
    with waiting(others=2, seconds=300) as (reception, came):
        with connected(reception) as worker:
            worker.send(hello(reception))
            time.sleep(0.3)
        assert "worker 1 (process 1 on there) is gone" in str(came())


def test_those_who_come_when_another_has_ended_are_taken_in_and_hear_of_it():
    with waiting(others=2) as (reception, came):
        with connected(reception) as first:
            first.send(hello(reception))
            time.sleep(0.3)
        with connected(reception) as second:
            second.send(hello(reception, rank=2))
            assert came() == {1, 2}


def test_a_leader_that_is_not_there_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(WorkerError, match=f"worker 0 cannot be reached at 127.0.0.1:{port}: .*refused"):
        call_on({"port": port, "password": "", **introduction()}, "127.0.0.1", 1, time.monotonic() + 5)


@pytest.mark.parametrize(
    ("host", "bound"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("192.0.2.7", "::"), ("", "")]
)
def test_the_reception_is_where_the_others_know_it(host, bound, monkeypatch):
    if host == "":  # a machine whose own name means a loopback address there, and there alone
        host, bound = "leader.example", "::"
        answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
        monkeypatch.setattr(reception_module.socket, "getaddrinfo", lambda *_, **__: answer)
    with Reception(host, 1) as reception:
        where = reception._listener.getsockname()[0]
        assert where in ({"::", "0.0.0.0"} if bound == "::" else {bound, "::1"})
