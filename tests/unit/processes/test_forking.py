from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from process_table import alive, eventually
from shoal.processes.forking import die_with, ending, fork, in_new_thread, leaving_garbage


def exit_code(body):
    pid = fork(body)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (lambda: None, 0, ""),
        (sys.exit, 0, ""),
        (lambda: sys.exit(3), 3, ""),
        (lambda: sys.exit("why"), 1, "why\n"),
        (lambda: 1 / 0, 1, "ZeroDivisionError: division by zero\n"),
        (lambda: os._exit(7), 7, ""),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), -signal.SIGTERM, ""),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 0, ""),
    ],
    ids=["returns", "exit", "exit 3", "exit why", "raises", "_exit", "terminated", "interrupted"],
)
def test_how_it_ends_is_its_exit_code(body, code, said, capfd):
    assert exit_code(body) == code
    errors = capfd.readouterr().err
    assert errors.endswith(said)
    assert bool(errors) == bool(said)


def test_what_the_parent_handles_is_not_handled_in_the_child():
    caught = []
    before = {number: signal.signal(number, lambda *_: caught.append(1)) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        assert exit_code(lambda: os.kill(os.getpid(), signal.SIGUSR1)) == 0
        assert exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert caught == [1]


def test_signals_that_a_thread_blocks_reach_the_child():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        assert exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


CODE = """
import atexit, os, sys
from shoal.processes.forking import fork
atexit.register(print, "at exit")
print("before", end=" ")
print("told", end=" ", file=sys.stderr)
pid = fork(lambda: print("child", end=" "))
os.waitpid(pid, 0)
print("after", end=" ")
"""


def test_output_is_written_once_and_clean_up_is_the_parents():
    done = subprocess.run([sys.executable, "-Werror", "-c", CODE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "before child after at exit\n"
    assert done.stderr == "told "


def test_pythons_warning_of_threads_is_for_others(monkeypatch):
    """From Python 3.12 on a fork beside threads warns, in the parent alone; as an error it would leave two of it."""
    real = os.fork

    def warns():
        pid = real()
        if pid:
            text = (
                f"This process (pid={os.getpid()}) is multi-threaded, use of fork() may lead to deadlocks in the child."
            )
            warnings.warn(text, DeprecationWarning, stacklevel=2)
        return pid

    monkeypatch.setattr(os, "fork", warns)
    filters = list(warnings.filters)
    assert exit_code(lambda: None) == 0
    assert warnings.filters == filters


class Left:
    """What must not be collected in another process: as a store of torch's, whose end waits for a thread of its own."""

    def __init__(self):
        self.owner = os.getpid()
        self.circle = self

    def __del__(self):
        if os.getpid() != self.owner:
            os._exit(3)


@pytest.fixture
def garbage():
    """Has something left in a circle that nobody knows any more."""
    gc.collect()
    gc.disable()
    Left()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.usefixtures("garbage")
def test_the_child_does_not_collect_what_the_parent_has_left():
    assert exit_code(gc.collect) == 0


def test_nor_does_one_that_others_fork_meanwhile():
    kept = [Left()]

    def body():
        kept.clear()
        gc.collect()

    with leaving_garbage():
        child = multiprocessing.get_context("fork").Process(target=body)
        child.start()
    child.join(20)
    code = child.exitcode
    child.kill()
    child.join(20)
    assert code == 0


def test_it_dies_with_its_parent():
    reading, writing = os.pipe()

    def parent():
        middle = os.getpid()

        def child():
            die_with(middle)
            os.write(writing, f"{os.getpid()}".encode())
            time.sleep(60)

        fork(child)
        time.sleep(60)

    middle = fork(parent)
    pid = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    assert alive(pid)
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    assert eventually(lambda: not alive(pid))


def test_a_child_whose_parent_is_gone_already_ends():
    assert exit_code(lambda: die_with(os.getpid())) == 1


def test_work_in_a_new_thread_returns_and_raises():
    assert in_new_thread(threading.get_ident) != threading.get_ident()
    for error in (ZeroDivisionError, TimeoutError, SystemExit):

        def work(error=error):
            raise error("its own")

        with pytest.raises(error, match="its own"):
            in_new_thread(work)


def test_meanwhile_it_looks(monkeypatch):
    monkeypatch.setattr("shoal.processes.forking.LOOK", 0.01)
    looks = []
    in_new_thread(lambda: eventually(lambda: len(looks) > 3, 5), lambda: looks.append(1))
    assert len(looks) > 3


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (-9, "was killed by SIGKILL (signal 9); the system may have run out of memory"),
        (-11, "was killed by SIGSEGV (signal 11)"),
        (-40, "was killed by signal 40"),
    ],
)
def test_ends_are_named(code, words):
    assert ending(code) == words
