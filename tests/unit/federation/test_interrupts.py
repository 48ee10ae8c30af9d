from __future__ import annotations

import os
import signal
import threading

import pytest

from shoal.federation.interrupts import deferred_interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block(number):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    before = signal.signal(number, stop)
    done = []
    try:
        with pytest.raises(Stopped):
            write_two(done, number)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert done == ["first", "second"]


def write_two(done, number):
    with deferred_interrupts():
        done.append("first")
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        done.append("second")
    done.append("never")


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = []
        write_two(done, signal.SIGINT)
        assert done == ["first", "second", "never"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_may_use_it():
    done = []

    def work():
        with deferred_interrupts():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert done == [1]
