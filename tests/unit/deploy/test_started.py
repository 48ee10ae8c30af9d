from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from process_table import alive, eventually
from shoal.deploy import started
from shoal.deploy.started import PROCESSES, StartedProcesses
from shoal.errors import ConfigurationError
from shoal.processes.table import in_sessions

SLEEP = ["sleep", "600"]

DEAF = [
    sys.executable,
    "-c",
    "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(600)",
]

# Ends, and leaves a child of its session behind.
LEAVES = ["sh", "-c", "sleep 600 & echo left"]


@pytest.fixture
def processes(tmp_path):
    """Starts processes; at the end none is there."""
    made = StartedProcesses(tmp_path)
    yield made
    with contextlib.suppress(ConfigurationError):
        made.stop(within=0.1)


def test_what_is_started_is_told_and_ended(processes, tmp_path):
    pids = [processes.start(name, SLEEP) for name in ("server", "site-1")]
    assert processes.alive() == {"server": True, "site-1": True}
    assert processes.pids() == dict(zip(("server", "site-1"), pids, strict=True))
    assert StartedProcesses(tmp_path).alive() == {"server": True, "site-1": True}  # as another process sees it
    assert processes.stop() == []
    assert not any(map(alive, pids))
    assert processes.alive() == {}
    assert processes.stop() == []


def test_what_it_writes_is_in_its_log(processes, tmp_path):
    code = "import os; print(os.environ['SHOAL_TEST'], os.getcwd()); print('\\n'.join(map(str, range(30))))"
    processes.start("server", [sys.executable, "-c", code], env={"SHOAL_TEST": "hello"}, cwd=tmp_path)
    assert eventually(lambda: not processes.alive()["server"])
    text = processes.log("server").read_text()
    assert text.splitlines()[0] == f"hello {tmp_path}"
    assert processes.last_lines("server", 2) == "28\n29"
    assert processes.last_lines("nobody") == ""


def test_it_has_a_session_of_its_own(processes):
    pid = processes.start("server", SLEEP)
    assert os.getsid(pid) == pid


def test_who_does_not_hear_is_killed(processes):
    pid = processes.start("deaf", DEAF)
    assert eventually(lambda: "deaf" in processes.last_lines("deaf"))
    assert processes.stop(within=0.2) == ["deaf"]
    assert not alive(pid)


def test_children_that_outlive_their_parent_are_ended(processes):
    pid = processes.start("server", LEAVES)
    assert eventually(lambda: not processes.alive()["server"])
    (child,) = in_sessions([pid])
    assert processes.stop() == []
    assert not alive(child)


def test_children_of_one_that_is_killed_are_ended_too(processes):
    pid = processes.start("server", ["sh", "-c", "sleep 600 & sleep 600"])
    assert eventually(lambda: len(in_sessions([pid])) == 3)
    left = in_sessions([pid])
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not processes.alive()["server"])
    processes.stop()
    assert not any(map(alive, left))


def test_a_name_is_used_once_at_a_time(processes):
    processes.start("server", SLEEP)
    with pytest.raises(ConfigurationError, match="server of .* runs already, as process"):
        processes.start("server", SLEEP)


def test_a_folder_has_one_deployment_at_a_time(processes, tmp_path):
    processes.check_none_runs()
    processes.start("server", SLEEP)
    with pytest.raises(
        ConfigurationError, match=r"a deployment runs in .* \(server\): end it with `shoal deploy down`"
    ):
        StartedProcesses(tmp_path).check_none_runs()
    os.kill(processes.pids()["server"], signal.SIGKILL)
    assert eventually(lambda: not processes.alive()["server"])
    processes.check_none_runs()


@pytest.mark.parametrize("engine", ["flwr", "nvflare"])
def test_a_deployment_that_runs_is_not_disturbed_by_a_second(processes, tmp_path, engine):
    pytest.importorskip(engine)
    local = importlib.import_module(
        {"flwr": "shoal.deploy.flower_local", "nvflare": "shoal.deploy.nvflare_local"}[engine]
    )
    pid = processes.start("site-a", SLEEP)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigurationError, match=r"a deployment runs in .* \(site-a\)"):
        local.up(tmp_path, ["a"], {"a": SLEEP}, within=5)
    assert alive(pid)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_an_ended_process_left_is_ended_before_its_name_is_used_again(processes):
    pid = processes.start("server", LEAVES)
    assert eventually(lambda: not processes.alive()["server"])
    (child,) = in_sessions([pid])
    again = processes.start("server", SLEEP)
    assert not alive(child)
    assert alive(again)


def test_a_command_that_is_none_is_told(processes):
    with pytest.raises(ConfigurationError, match="server cannot be started: /nowhere/to:"):
        processes.start("server", ["/nowhere/to"])
    assert processes.alive() == {}


@pytest.mark.parametrize("change", [{"began": 1}, {"boot": "of an earlier start"}])
def test_another_process_with_its_number_is_left_alone(processes, tmp_path, change):
    with subprocess.Popen(SLEEP, start_new_session=True) as other:
        try:
            path = tmp_path / PROCESSES
            processes.start("server", SLEEP)
            own = processes.pids()["server"]
            told = json.loads(path.read_text())
            entry = {**told["server"], "pid": other.pid, "began": started._began(other.pid), **change}
            path.write_text(json.dumps({**told, "stale": entry}))
            assert processes.alive() == {"server": True, "stale": False}
            assert processes.stop() == []
            assert not alive(own)
            assert other.poll() is None
        finally:
            other.kill()


NOTES = """
import signal, sys, time
def end(*_):
    open(sys.argv[1], "a").write(sys.argv[2])
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("on", flush=True)
time.sleep(600)
"""


def test_they_are_ended_newest_first(processes, tmp_path):
    for name in "abc":
        processes.start(name, [sys.executable, "-c", NOTES, str(tmp_path / "ends"), name])
    assert eventually(lambda: all("on" in processes.last_lines(name) for name in "abc"))
    assert processes.stop() == []
    assert (tmp_path / "ends").read_text() == "cba"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"server": 3}', '{"server": {"pid": 1}}', '{"server": {"pid": "x", "began": 1}}']
)
def test_a_list_that_cannot_be_read_is_told(processes, tmp_path, text):
    (tmp_path / PROCESSES).write_text(text)
    with pytest.raises(ConfigurationError, match="processes.json cannot be read"):
        processes.alive()


def test_the_end_has_a_deadline(processes):
    processes.start("deaf", DEAF)
    assert eventually(lambda: "deaf" in processes.last_lines("deaf"))
    began = time.monotonic()
    processes.stop(within=0.3)
    assert time.monotonic() - began < 3
