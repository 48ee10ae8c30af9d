from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from process_table import alive, eventually, open_files
from shoal.processes.table import credentials, handle, in_sessions, kill, marked, standing


@pytest.fixture
def sleeper():
    """A process that does nothing, in a session of its own, with a mark."""
    environment = {**os.environ, "SHOAL_TEST_MARK": "a value"}
    with subprocess.Popen(["sleep", "60"], env=environment, start_new_session=True) as process:
        yield process
        process.kill()


def test_a_process_is_found_by_its_mark_until_it_ends(sleeper):
    assert eventually(lambda: marked("SHOAL_TEST_MARK", "a value") == [sleeper.pid])
    assert marked("SHOAL_TEST_MARK", "a valu") == marked("SHOAL_TEST_MAR", "a value") == []
    sleeper.kill()
    assert eventually(lambda: marked("SHOAL_TEST_MARK", "a value") == [])


def test_this_process_is_not_among_the_marked():
    code = "import os; from shoal.processes.table import marked; print(marked('SHOAL_TEST_MARK', 'own'))"
    environment = {**os.environ, "SHOAL_TEST_MARK": "own"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert told.stdout == "[]\n", told.stderr


def test_the_processes_of_a_session_are_those_that_live():
    script = "sleep 61 & echo $!; exec sleep 62"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        second = int(first.stdout.readline())
        assert sorted(in_sessions([first.pid])) == sorted([first.pid, second])
        first.kill()
        assert eventually(lambda: not alive(first.pid))
        assert in_sessions([first.pid]) == [second]  # and the number is kept for it
        os.kill(second, signal.SIGKILL)
        assert eventually(lambda: in_sessions([first.pid]) == [])
    assert in_sessions([]) == []


def test_how_a_process_stands(sleeper):
    assert eventually(lambda: standing(sleeper.pid).state == "S")
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert eventually(lambda: standing(sleeper.pid).state == "T")
    sleeper.kill()
    assert eventually(lambda: standing(sleeper.pid).state == "Z")
    sleeper.wait()
    assert standing(sleeper.pid) is None


def test_work_takes_ticks():
    before = standing(os.getpid()).ticks
    assert eventually(lambda: standing(os.getpid()).ticks > before)


def test_a_name_with_parentheses_and_spaces_is_no_trouble(tmp_path):
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        try:
            assert eventually(lambda: standing(process.pid).state == "S")
        finally:
            process.kill()


def test_who_is_at_the_other_end():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert credentials(ours) == (os.getpid(), os.getuid())


def test_a_handle_ends_its_process_and_no_other(sleeper):
    before = open_files()
    process = handle(sleeper.pid)
    kill(process)
    assert sleeper.wait(10) == -signal.SIGKILL
    kill(process)  # without effect
    os.close(process)
    assert handle(sleeper.pid) is None
    assert open_files() == before
