"""The ends of sites' processes at any moment of a run: those of ranks, launchers and the server."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import shoal
from process_table import alive, children, eventually
from shoal.cli.exits import FAILED, exit_code
from shoal.errors import ShoalError, SiteError
from shoal.processes.table import marked
from shoal.sites.address import FOLDER
from shoal.sites.runner import SiteRunner
from site_jobs import SCRIPT, START, Jobs, expected, family, site_of

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


def strike(launcher, moment, number, state=None):
    """Sends a signal to a rank of a site, which may have only just begun, or has joined where a state is given."""
    if state is not None:
        eventually(lambda: state.present, 30)
    time.sleep(moment)
    until = time.monotonic() + 20
    while time.monotonic() < until and alive(launcher):
        if ranks := [pid for pid in children(launcher) if alive(pid)]:
            os.kill(random.Random(moment).choice(ranks), number)
            return


LAUNCH_ALL = SiteRunner._launch_all


def strikes(monkeypatch, moments, *, joined=False):
    """Has ranks struck in the job that runs next.

    Args:
        monkeypatch: Undoes it.
        moments: When and by which signal, by site.
        joined: Whether SIGSTOP counts its seconds from when the site's ranks have joined: of one that is stopped before
            that, the deadline for the start alone tells, and that is long.

    Returns:
        The threads that strike, once the job runs.
    """
    others = []

    def launch(engine, hub):
        for site, launcher in zip(engine.sites, engine._launchers, strict=True):
            if site.name in moments:
                moment, number = moments[site.name]
                state = engine._states[site.name] if joined and number == signal.SIGSTOP else None
                others.append(threading.Thread(target=strike, args=(launcher.pid, moment, number, state)))
                others[-1].start()
        LAUNCH_ALL(engine, hub)

    monkeypatch.setattr(SiteRunner, "_launch_all", launch)
    return others


@pytest.fixture
def draw():
    """What the moments are drawn from; its seed is told where the test fails."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_struck_at_any_moment_is_started_again(jobs, monkeypatch, draw, number):
    """Each site's at a moment of its own; the result is that of an undisturbed run, bit for bit."""
    sites = {f"site-{site}": 2 for site in range(1, MOMENTS + 1)}
    settings = {"rounds": ROUNDS, "pause": 0.05, "waits": shoal.Deadlines(start=20, reply=60, silence=2, finish=10)}
    whole = jobs.job(sites, **settings).run().params["w"]
    others = strikes(monkeypatch, {site: (draw.uniform(0, LONG), number) for site in sites})
    struck = jobs.job(sites, **settings, on_failure="restart").run().params["w"]
    for other in others:
        other.join(30)
    assert len(others) == MOMENTS
    assert struck.tobytes() == whole.tobytes()


WAITS = shoal.Deadlines(start=30, reply=60, silence=3)

HOW = {signal.SIGKILL: "was ended by SIGKILL", signal.SIGSTOP: "was stopped, as by SIGSTOP"}


@pytest.mark.parametrize(("number", "moments"), [(signal.SIGKILL, 3), (signal.SIGSTOP, 2)])
def test_a_rank_that_is_struck_at_any_moment_stops_the_run(jobs, monkeypatch, draw, number, moments):
    before = set(family(os.getpid()))
    for _ in range(moments):
        others = strikes(monkeypatch, {"site-2": (draw.uniform(0, 1), number)}, joined=True)
        job = jobs.job({"site-1": 2, "site-2": 2}, rounds=10_000, pause=0.05, waits=WAITS)
        with pytest.raises(SiteError, match=rf"^site-2: rank [01] \(process \d+\) {HOW[number]} in round") as raised:
            job.run()
        others[0].join(30)
        assert exit_code(raised.value) == FAILED
        assert eventually(lambda: set(family(os.getpid())) <= before, 1.0)
        assert not jobs.left()


def test_a_run_goes_on_without_the_ranks_that_are_struck_at_any_moment(jobs, monkeypatch, draw):
    """Each site's at a moment of its own; the numbers are those of the sites that were there in each round."""
    rounds = 30
    struck = {f"site-{site}": 2 for site in range(1, 5)}
    sites = struck | {"site-5": 2}
    numbers = [signal.SIGKILL, signal.SIGSTOP] * 2
    moments = {site: (draw.uniform(0, 1), number) for site, number in zip(struck, numbers, strict=True)}
    others = strikes(monkeypatch, moments, joined=True)
    present, errors = {site: set() for site in sites}, {}

    class Ends(shoal.Callback):
        def on_client_end(self, round, client, error):
            site = f"site-{client + 1}"
            if error is None:
                present[site].add(round)
            else:
                errors.setdefault(site, str(error))

    job = jobs.job(sites, rounds=rounds, pause=0.05, waits=WAITS, on_failure="continue", min_sites=1)
    result = job.run(callbacks=[Ends()])
    for other in others:
        other.join(30)
    assert errors.keys() == struck.keys()
    for site, (_, number) in moments.items():
        assert re.search(rf"^{site}: rank [01] \(process \d+\) {HOW[number]} in round", errors[site]), errors[site]
        assert present[site] == set(range(1, len(present[site]) + 1))
    assert present["site-5"] == set(range(1, rounds + 1))
    np.testing.assert_allclose(result.params["w"], expected(present, rounds=rounds), atol=1e-6)


PROGRAM = Path(__file__).parents[1] / "site_server.py"


class Server:
    """A program that runs a job, as a user's does, or the command.

    Args:
        nursery: Starts it, where it is not to be a program of its own.
        folder: For all that it writes.
    """

    def __init__(self, nursery, folder):
        self.folder = folder
        (folder / "pids").mkdir()
        self._nursery = nursery

    def start(self, *, resume=False):
        """Starts the user's; returns the process."""
        return self._begin("main", self.folder, "quick", "resume" if resume else "new")

    def command(self, *words):
        """Starts ``shoal``, with these words; returns the process."""
        return self._begin("command", *words)

    def _begin(self, function, *words):
        return self._nursery.start(
            f"site_server:{function}",
            output=self.folder / "said",
            arguments=words,
            cwd=self.folder,
            environment={"TMPDIR": str(self.folder)},
        )

    def export(self, rounds):
        """Writes a job of two sites with two ranks each to the folder "job"."""
        shoal.Job(
            "try",
            script=SCRIPT,
            args=[json.dumps({"pids": str(self.folder / "pids"), "pause": 0.1})],
            model={"w": START},
            sites=[site_of(site, 2) for site in ("site-1", "site-2")],
            rounds=rounds,
            accelerator="cpu",
            settings={"tensorboard": False},
        ).export(self.folder / "job")

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
    if number != signal.SIGKILL and when == "rounds":
        assert "RunInterrupted: stopped after round" in run.told
    run = server.start(resume=(server.folder / "run").exists())
    assert run.wait(60) == 0, run.told
    np.testing.assert_allclose(server.result(), WANTED, atol=1e-6)
    assert not server.left()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_ended_leaves_nothing_and_says_how_its_run_can_go_on(server, number, code):
    rounds = 10
    server.export(rounds)
    words = ["federate", "job", "--run-dir", "run"]
    run = server.command(*words)
    assert eventually(lambda: server.rounds() >= 2 or run.code is not None, 30), run.told
    processes = family(run.pid)
    assert len(processes) >= 6, run.told  # two launchers and four ranks
    run.send(number)
    assert run.wait(30) == code, run.told
    assert not [pid for pid in processes if alive(pid)]
    assert not server.left()
    done = server.rounds()
    *_, last = run.told.splitlines()
    words.append("--resume")
    assert last == f"shoal: stopped after round {done}; the state is saved in run; to go on: shoal {' '.join(words)}"
    run = server.command(*words)
    assert run.wait(60) == 0, run.told
    assert re.findall(r"^round (\d+)/", run.told, re.M)[0] == str(done + 1)
    wanted = expected(dict.fromkeys(["site-1", "site-2"], range(1, rounds + 1)), rounds=rounds)
    np.testing.assert_allclose(load_file(server.folder / "run" / "model.safetensors")["w"], wanted, atol=1e-6)


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
