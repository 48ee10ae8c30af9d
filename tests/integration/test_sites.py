"""Federations of sites from start to end: their numbers, their pace, who may come in, and what they take."""

from __future__ import annotations

import json
import os
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import shoal
import shoal.sites.connection
from process_table import eventually, open_files
from shoal.errors import ConfigurationError, DataError, ShoalError, StorageError
from shoal.sites.address import Address
from shoal.sites.log import SiteLog
from site_jobs import Jobs, expected, said
from support import Failing, Mlp, assert_equal, population, samples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PAIR = {"site-1": 1, "site-2": 1}


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Jobs whose processes are forked from this one, so that they start at once."""
    with Jobs(tmp_path).watched(monkeypatch, quick=True) as jobs:
        yield jobs


class AtRound(shoal.Callback):
    """Does something at the end of each round.

    Args:
        act: Is given the round's number.
    """

    def __init__(self, act):
        self.act = act

    def on_round_end(self, record):
        self.act(record["round"])


class TestRounds:
    def test_are_weighted_means_and_are_measured(self, jobs, tmp_path):
        sites = {"site-1": 1, "site-2": 2}
        result = jobs.job(sites, evaluate=True).run(run_dir=tmp_path / "run")
        np.testing.assert_allclose(result.params["w"], expected(dict.fromkeys(sites, range(1, 5))), atol=1e-6)
        assert result.history[-1]["accuracy"] == pytest.approx(result.params["w"][0])
        assert result.history[-1]["examples"] == 3
        for site, ranks in sites.items():
            lines = (tmp_path / "run" / "sites" / f"{site}.log").read_text().splitlines()
            assert sorted(lines) == sorted(
                f"rank {rank}: {what} {site}" for rank in range(ranks) for what in ("hello from", "the end of")
            )

    def test_go_on_after_a_resume(self, jobs, tmp_path):
        whole = jobs.job(PAIR).run(run_dir=tmp_path / "whole")

        def fail(number):
            if number == 2:
                raise ZeroDivisionError

        job = jobs.job(PAIR)
        with pytest.raises(ZeroDivisionError):
            job.run(run_dir=tmp_path / "parts", callbacks=[AtRound(fail)])
        resumed = job.run(run_dir=tmp_path / "parts", resume=True)
        assert resumed.params["w"].tobytes() == whole.params["w"].tobytes()

    def test_leave_out_a_site_that_is_late_and_take_it_again(self, jobs):
        """Its late reply is thrown away."""
        faults = {"site-2": {"does": "slow", "round": 2}}
        there = {site: set() for site in PAIR}

        class Ends(shoal.Callback):
            def on_client_end(self, round, client, error):
                if error is None:
                    there[f"site-{client + 1}"].add(round)

        job = jobs.job(PAIR, faults=faults, deadline=2.5, min_sites=1, pause=0.3, rounds=14)
        result = job.run(callbacks=[Ends()])
        assert there["site-1"] == set(range(1, 15))
        late = there["site-1"] - there["site-2"]
        assert late
        assert max(there["site-2"]) == 14
        np.testing.assert_allclose(result.params["w"], expected(there, rounds=14), atol=1e-6)

    def test_of_two_jobs_at_once_do_not_meet(self, jobs, tmp_path):
        results = {}

        def run(seed):
            results[seed] = jobs.job(PAIR, seed=seed, pause=0.1).run(run_dir=tmp_path / f"run-{seed}")

        other = threading.Thread(target=run, args=(1,))
        other.start()
        run(2)
        other.join(60)
        assert len(set(jobs.folders)) == 2
        for seed in (1, 2):
            wanted = expected(dict.fromkeys(PAIR, range(1, 5)), seed=seed)
            np.testing.assert_allclose(results[seed].params["w"], wanted, atol=1e-6)

    def test_take_no_more_memory_as_they_go_on(self, jobs):
        """Of the server and of each rank; its model has a megabyte."""
        sizes = {}

        def look(number):
            for pid in [os.getpid(), *jobs.processes()]:
                rows = Path(f"/proc/{pid}/status").read_text().splitlines()
                kib = {row.split(":")[0]: row.split()[1] for row in rows if row.startswith("Rss")}
                sizes.setdefault(pid, {})[number] = int(kib["RssAnon"]) + int(kib["RssShmem"])

        files = {}
        job = jobs.job(PAIR, rounds=100)
        job.model["w"] = np.zeros(1 << 18, np.float32)
        job.run(
            callbacks=[
                AtRound(look),
                AtRound(lambda number: files.setdefault(number, len(open_files()))),
            ]
        )
        assert len(sizes) >= 5
        for pid, kib in sizes.items():
            early, late = (sorted(kib[number] for number in part)[5] for part in (range(10, 21), range(90, 101)))
            assert late <= 1.02 * early, (pid, early, late)
        assert files[100] == files[10]


class TestFullDisks:
    def test_cost_lines_of_logs_and_not_the_run(self, jobs, tmp_path):
        """A site's failure is told with its last lines all the same, from memory."""
        errors = []

        class Ends(shoal.Callback):
            def on_client_end(self, round, client, error):
                errors.extend(filter(None, [error]))

        def fill(number):
            if number == 1:
                for site in PAIR:
                    path = tmp_path / "run" / "sites" / f"{site}.log"
                    assert eventually(lambda path=path: b"hello" in path.read_bytes())
                    [row] = [row for row in open_files() if row.endswith(str(path))]
                    with Path("/dev/full").open("wb") as full:
                        os.dup2(full.fileno(), int(row.split()[0]), inheritable=False)

        faults = {"site-2": {"does": "raise", "round": 2}}
        job = jobs.job(PAIR, faults=faults, on_failure="continue", min_sites=1)
        result = job.run(run_dir=tmp_path / "run", callbacks=[AtRound(fill), Ends()])
        wanted = expected({"site-1": range(1, 5), "site-2": [1]})
        np.testing.assert_allclose(result.params["w"], wanted, atol=1e-6)
        assert "RuntimeError: the user's own error" in said(errors[0])
        for site in PAIR:
            assert (tmp_path / "run" / "sites" / f"{site}.log").read_text() == f"rank 0: hello from {site}\n"

    def test_are_told_before_the_first_round(self, jobs, tmp_path, monkeypatch):
        keep = SiteLog.keep

        def full(log, path):
            assert eventually(lambda: log.last(0))
            keep(log, Path("/dev/full"))

        monkeypatch.setattr(SiteLog, "keep", full)
        with pytest.raises(StorageError, match="^/dev/full could not be written: the disk is full"):
            jobs.job(PAIR).run(run_dir=tmp_path / "run")


class Stranger:
    """Tries to come in while a job runs.

    Args:
        jobs: The job's.
    """

    def __init__(self, jobs):
        self._jobs = jobs
        self.heard = []

    def says(self, *data):
        """Connects, sends this, and notes whether the other end closes the connection."""
        folder = self._jobs.folders[-1]
        stream = Address(folder, "").call(5)
        with stream:
            stream.settimeout(10)
            for one in data:
                stream.send(one)
            try:
                self.heard.append(stream.recv(100))
            except ConnectionResetError:
                self.heard.append(b"")


class TestStrangers:
    def test_are_turned_away_and_the_run_goes_on(self, jobs, monkeypatch):
        stranger = Stranger(jobs)

        def hello(**more):
            return json.dumps({"site": "site-1", "attempt": 0, "rank": 0, "ranks": 1} | more).encode()

        def visit():
            key = (jobs.folders[-1] / "key").read_text()
            stranger.says(hello())
            stranger.says(hello(key="0" * 64))
            stranger.says(hello(key=key[:-1]))
            stranger.says(hello(key=None))
            stranger.says(hello(key=key, site="site-3"))
            stranger.says(hello(key=key, attempt=5))
            stranger.says(hello(key=key, attempt="x"))
            stranger.says(b"\xff garbage")
            stranger.says(b"[" * 60_000)
            stranger.says(b"{}", b"{}")

        others = []

        def come(number):
            if number == 2:
                others.append(threading.Thread(target=visit))
                others[0].start()

        result = jobs.job(PAIR, pause=0.5).run(callbacks=[AtRound(come)])
        others[0].join(30)
        assert stranger.heard == [b""] * 10
        np.testing.assert_allclose(result.params["w"], expected(dict.fromkeys(PAIR, range(1, 5))), atol=1e-6)

    def test_of_another_user_are_turned_away(self, jobs, monkeypatch):
        stranger, who, others = Stranger(jobs), shoal.sites.connection.credentials, []

        def visit():
            key = (jobs.folders[-1] / "key").read_text()
            monkeypatch.setattr(shoal.sites.connection, "credentials", lambda stream: (who(stream)[0], os.getuid() + 1))
            stranger.says(json.dumps({"key": key, "site": "site-1", "attempt": 0, "rank": 0, "ranks": 1}).encode())
            monkeypatch.setattr(shoal.sites.connection, "credentials", who)

        def come(number):
            if number == 2:
                others.append(threading.Thread(target=visit))
                others[0].start()

        jobs.job(PAIR, pause=0.5).run(callbacks=[AtRound(come)])
        others[0].join(30)
        assert stranger.heard == [b""]

    def test_that_come_as_a_rank_that_is_there_are_turned_away(self, jobs):
        """As a program that the script starts, with its environment."""
        result = jobs.job(PAIR, faults={"site-2": {"does": "again", "round": 2}}).run()
        np.testing.assert_allclose(result.params["w"], expected(dict.fromkeys(PAIR, range(1, 5))), atol=1e-6)


def learner(model=Mlp, **settings):
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return shoal.TorchLearner(model, **{"loss": F.cross_entropy, "optimizer": optimizer, "batch_size": 4} | settings)


def learning(clients, **settings):
    """Returns a job in which a learner trains, on each client's data at a site of its own."""
    sites = [shoal.Site(f"site-{index}", data=clients[index]) for index in range(len(clients))]
    return shoal.Job("learn", **{"learner": learner(), "sites": sites, "accelerator": "cpu", "rounds": 3} | settings)


class TestLearners:
    @pytest.mark.parametrize("algorithm", [shoal.FedAvg(), shoal.FedProx(mu=0.3)], ids=["fedavg", "fedprox"])
    def test_train_as_on_the_sequential_engine(self, jobs, algorithm):
        clients = population((12, 20))
        held_out = samples(40, seed=5)
        sequential = shoal.federate(
            learner(), clients, rounds=3, algorithm=algorithm, evaluate=held_out, engine="sequential", seed=4
        )
        result = learning(clients, algorithm=algorithm, evaluate=held_out, seed=4).run()
        assert_equal(result.params, sequential.params)
        for ours, theirs in zip(result.history, sequential.history, strict=True):
            assert ours["loss"] == theirs["loss"]
            assert ours["train_loss"] == theirs["train_loss"]

    def test_that_fail_are_told(self, jobs):
        clients = population((12, 20))
        with pytest.raises(ShoalError) as raised:
            learning(clients, learner=learner(partial(Failing, fail))).run()
        assert "site-" in str(raised.value)
        assert "ZeroDivisionError: the user's own loss" in said(raised.value)

    def test_data_that_cannot_be_are_refused_before_anything_starts(self, jobs):
        clients = population((12, 20))
        wrong = shoal.data.ArrayDataset(np.zeros((6, 3), np.float32), np.arange(6) % 3, classes=3)
        for settings in (
            {"evaluate": wrong},
            {"sites": [shoal.Site("site-1", data=wrong)]},
        ):
            with pytest.raises((DataError, ConfigurationError)):
                learning(clients, **settings).run()
        assert not jobs.folders


def fail(inputs):
    raise ZeroDivisionError("the user's own loss")
