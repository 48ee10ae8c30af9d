"""The ends of sites' processes at any moment of a run: those of ranks, launchers and the server."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import shoal
from process_table import alive, children, eventually
from shoal.errors import ShoalError, SiteError
from shoal.processes.table import marked
from shoal.sites.address import FOLDER
from site_jobs import START, Jobs, expected

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MOMENTS = 10
"""At so many moments of a run a rank is struck."""

LONG = 2.0
"""Seconds after the start of which the moments are drawn: the start, the rounds and the end."""

ROUNDS = 12


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Jobs whose processes are forked from this one, so that they start at once."""
    with Jobs(tmp_path).watched(monkeypatch, quick=True) as jobs:
        yield jobs


def strike(launcher, moment, number):
    """Sends a signal to a rank of a site, which may have only just begun."""
    time.sleep(moment)
    until = time.monotonic() + 20
    while time.monotonic() < until and alive(launcher):
        if ranks := [pid for pid in children(launcher) if alive(pid)]:
            os.kill(random.Random(moment).choice(ranks), number)
            return


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_struck_at_any_moment_is_started_again(jobs, monkeypatch, number):
    """Each site's at a moment of its own; the result is that of an undisturbed run, bit for bit."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    sites = {f"site-{site}": 2 for site in range(1, MOMENTS + 1)}
    settings = {"rounds": ROUNDS, "pause": 0.05, "waits": shoal.Deadlines(start=15, reply=60, silence=2, finish=10)}
    whole = jobs.job(sites, **settings).run().params["w"]
    others, start = [], shoal.engines.SitesEngine._launch_all

    def launch(engine, hub):
        for launcher in engine._launchers:
            others.append(threading.Thread(target=strike, args=(launcher.pid, draw.uniform(0, LONG), number)))
            others[-1].start()
        start(engine, hub)

    monkeypatch.setattr(shoal.engines.SitesEngine, "_launch_all", launch)
    struck = jobs.job(sites, **settings, on_failure="restart").run().params["w"]
    for other in others:
        other.join(30)
    assert len(others) == MOMENTS
    assert struck.tobytes() == whole.tobytes()


PROGRAM = Path(__file__).parents[1] / "site_server.py"


class Server:
    """A program that runs a job, as a user's does.

    Args:
        nursery: Starts it, where it is not to be a program of its own.
        folder: For all that it writes.
    """

    def __init__(self, nursery, folder):
        self.folder = folder
        (folder / "pids").mkdir()
        self._nursery = nursery

    def start(self, *, resume=False):
        """Starts it; returns the process."""
        return self._nursery.start(
            "site_server:main",
            output=self.folder / "said",
            arguments=[self.folder, "quick", "resume" if resume else "new"],
            cwd=self.folder,
            environment={"TMPDIR": str(self.folder)},
        )

    def rounds(self):
        """Returns how many rounds are done."""
        metrics = self.folder / "run" / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def result(self):
        """Returns the weights that it has told of."""
        line = next(one for one in (self.folder / "said").read_text().splitlines() if one.startswith("RESULT"))
        return np.frombuffer(bytes.fromhex(line.split()[1]), np.float32)

    def left(self):
        """Returns the processes that it has left behind."""
        return [int(file.name) for file in (self.folder / "pids").iterdir() if alive(int(file.name))]


@pytest.fixture
def server(nursery, tmp_path):
    server = Server(nursery, tmp_path)
    yield server
    for pid in server.left():
        os.kill(pid, signal.SIGKILL)


WANTED = expected(dict.fromkeys(["site-1", "site-2"], range(1, 13)), rounds=12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("when", ["start", "rounds"])
def test_a_server_that_is_ended_leaves_nothing_and_its_run_can_go_on(server, number, when):
    run = server.start()
    pids = server.folder / "pids"
    reached = (lambda: any(pids.iterdir())) if when == "start" else (lambda: server.rounds() >= 2)
    assert eventually(reached, 30), run.told
    time.sleep(random.Random(number).uniform(0, 0.3))
    run.send(number)
    code = run.wait(30)
    assert code != 0, run.told
    assert eventually(lambda: not server.left(), 15), run.told
    if number == signal.SIGINT and when == "rounds":
        assert "RunInterrupted: stopped after round" in run.told
    run = server.start(resume=(server.folder / "run").exists())
    assert run.wait(60) == 0, run.told
    np.testing.assert_allclose(server.result(), WANTED, atol=1e-6)
    assert not server.left()


def test_programs_end_with_the_program_that_started_them(tmp_path):
    """Sites of real programs: marked in the process table, and gone with the run, also where nobody could end them."""
    (tmp_path / "pids").mkdir()
    with subprocess.Popen(
        [sys.executable, PROGRAM, tmp_path, "programs", "new"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        metrics = tmp_path / "run" / "metrics.jsonl"
        try:
            assert eventually(lambda: metrics.exists() and metrics.read_bytes(), 60)
            launchers = children(run.pid)
            environment = Path(f"/proc/{launchers[0]}/environ").read_text().split("\0")
            folder = next(row.partition("=")[2] for row in environment if row.startswith(f"{FOLDER}="))
            assert len(marked(FOLDER, folder)) == 5  # two launchers and three ranks
        finally:
            run.kill()
        assert eventually(lambda: not marked(FOLDER, folder), 20)
        assert eventually(lambda: not Path(folder).exists(), 5)


def test_a_program_that_does_not_know_shoal_is_told(jobs, tmp_path, monkeypatch, capfd):
    monkeypatch.undo()
    script = tmp_path / "other.py"
    script.write_text("print('just this', flush=True)\n")
    job = shoal.Job("try", script=script, model={"w": START}, sites=[shoal.Site("site-1")], rounds=2, accelerator="cpu")
    with pytest.raises(SiteError, match="^site-1: its script ended before the federation did"):
        job.run()
    assert "site-1: just this" in capfd.readouterr().err
    bad = shoal.Site("site-2", command=["/no/such/program"])
    job = shoal.Job("try", script=script, model={"w": START}, sites=[shoal.Site("site-1"), bad], rounds=2)
    with pytest.raises(ShoalError, match="site-2 cannot be started: /no/such/program"):
        job.run()
    bad = shoal.Site("site-1", command=["false"])
    job = shoal.Job("try", script=script, model={"w": START}, sites=[bad], rounds=2)
    with pytest.raises(SiteError, match="site-1: its launcher ended at once"):
        job.run()
