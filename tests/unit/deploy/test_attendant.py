"""A site that belongs to one job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from process_table import alive, eventually
from shoal.deploy.attendant import ATTENDANT, PrivateSite, main
from shoal.deploy.bridge import ADDRESS
from shoal.errors import ConfigurationError, EngineError

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),  # it is meant to live on
]

SITE = """
import json, os, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
pathlib.Path("pids").write_text(f"{os.getpid()} {child.pid}")
pathlib.Path("address.json").write_text(json.dumps({"socket": "none"}))
time.sleep(60)
"""


@pytest.fixture
def watched():
    """The process that stands for the job."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def site(tmp_path, watched):
    site = PrivateSite(tmp_path / "site", ends_with=watched.pid)
    yield site
    site.stop()


def start(site, *, code=SITE):
    command = ["sh", "-c", 'cd "$0" && exec "$@"', str(site.folder), sys.executable, "-c", code]
    site.start(lambda: command, aborted=lambda: False)


def processes(site):
    return [*map(int, (site.folder / "pids").read_text().split()), attendant(site)]


def attendant(site):
    return json.loads((site.folder / ATTENDANT).read_text())["pid"]


def test_it_is_started_once_also_by_another_process_of_the_client(site, watched):
    start(site)
    first = processes(site)
    start(site)
    PrivateSite(site.folder, ends_with=watched.pid).start(lambda: ["false"], aborted=lambda: False)
    assert processes(site) == first
    assert all(map(alive, first))


def test_it_ends_with_the_job_and_all_that_it_has_started(site, watched):
    start(site)
    pids = processes(site)
    watched.kill()
    watched.wait()
    assert eventually(lambda: not any(map(alive, pids)), seconds=20)


def test_it_ends_when_it_is_told_to(site):
    start(site)
    pids = processes(site)
    site.stop()
    assert not any(map(alive, pids))
    site.stop()


def test_a_site_that_does_not_end_by_itself_is_killed(site, monkeypatch):
    start(site, code="import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SITE)
    pids = processes(site)
    os.kill(attendant(site), signal.SIGTERM)
    assert eventually(lambda: not any(map(alive, pids)), seconds=30)


def test_a_new_one_is_started_where_the_last_was_killed(site):
    start(site)
    own, _, first = processes(site)
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: not alive(first) and not alive(own))
    start(site)
    assert attendant(site) != first


def test_one_that_cannot_start_says_why(site):
    with pytest.raises(EngineError, match=r"has ended:[\s\S]*no settings"):
        start(site, code="raise SystemExit('no settings')")


def test_an_aborted_job_does_not_wait_for_it(site):
    site.start(lambda: ["sleep", "60"], aborted=lambda: True)
    assert not (site.folder / ADDRESS).exists()


@pytest.mark.parametrize("arguments", [[], ["x", "--", "true"], ["1", "true", "x"], ["1", "--"]])
def test_its_arguments_are_checked(arguments):
    with pytest.raises(ConfigurationError, match="PID -- COMMAND"):
        main(arguments)


def test_nothing_is_started_for_a_job_that_is_over(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert main([str(ended.pid), "--", "touch", str(tmp_path / "made")]) == 0
    assert not Path(tmp_path / "made").exists()
