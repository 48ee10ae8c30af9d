from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from typer.testing import CliRunner

import shoal.bench.sites
from shoal.bench.server_memory import ServerMemory, descendants
from shoal.bench.site_case import SiteCase, SiteRun
from shoal.bench.sites import cost_of, measure_sites
from shoal.cli.main import app
from shoal.errors import ConfigurationError, EngineError
from shoal.experiments import build, load
from shoal.processes.memory import most_resident, resident
from shoal.trees import nbytes
from shoal.types import Broadcast

CASE = SiteCase(engine="local", size_mb=2.0, sites=2, ranks=1, rounds=3)


def record(seconds, *sites):
    return {
        "seconds": seconds,
        "site_seconds": {f"site-{number}": own for number, own in enumerate(sites, 1)},
        "bytes_down": 4_000_000,
        "bytes_up": 3_000_000,
        "memory_bytes": 7,
    }


def test_the_first_round_does_not_count_and_the_slowest_site_does():
    records = [record(99.0, 0.1, 0.1), record(3.0, 0.5, 1.0), record(2.0, 1.5, 0.5), record(9.0, 2.0, 1.0)]
    cost = cost_of(CASE, SiteRun(records=records, memory_bytes=5_000_000), least=1_000_000)
    assert (cost.rounds, cost.seconds, cost.training_seconds, cost.overhead_seconds) == (3, 3.0, 1.5, 2.0)
    assert (cost.bytes_moved, cost.memory_bytes, cost.memory_models) == (7_000_000, 4_000_000, 2.0)


def test_an_engine_that_tells_no_times_of_sites_has_only_overhead():
    cost = cost_of(CASE, SiteRun(records=[record(1.0), record(2.0)], memory_bytes=0), least=10)
    assert (cost.training_seconds, cost.overhead_seconds, cost.memory_bytes) == (0.0, 2.0, 0)


def test_a_run_without_rounds_is_an_error():
    with pytest.raises(EngineError, match="local with 2 MB has no rounds after its first"):
        cost_of(CASE, SiteRun(records=[record(1.0)], memory_bytes=0), least=0)


class Sites:
    """Takes 3 models and 50 MB, and with the engine's own FedAvg 5 models."""

    def __init__(self):
        self.cases = []

    def run(self, case, folder):
        self.cases.append(case)
        assert not folder.exists()
        models = 5 if case.own else 3
        rounds = [record(1.0, 0.25)] * (case.rounds + 1)
        return SiteRun(records=rounds, memory_bytes=round(50e6 + models * 1e6 * case.size_mb))


@pytest.fixture
def opened():
    found = {}

    @contextmanager
    def open_(engine, names, ranks, folder):
        assert folder.is_dir()
        found[engine] = (names, ranks, Sites())
        yield found[engine][2]

    open_.found = found
    return open_


def test_sizes_go_upward_and_both_take_turns(opened):
    told = []
    costs = measure_sites(
        sizes=[10, 1], sites=3, ranks=2, rounds=4, engines=["local", "flower"], baseline=True, tell=told.append,
        opened=opened,
    )  # fmt: skip
    assert [(cost.engine, cost.own, cost.size_mb) for cost in costs] == [
        ("local", False, 1),
        ("local", False, 10),
        ("flower", False, 1),
        ("flower", True, 1),
        ("flower", False, 10),
        ("flower", True, 10),
    ]
    assert all(cost.rounds == 4 and cost.sites == 3 and cost.ranks == 2 for cost in costs)
    assert [cost.memory_models for cost in costs] == pytest.approx([3, 3, 3, 5, 3, 5], abs=0.06)
    names, ranks, sites = opened.found["flower"]
    assert (names, ranks) == (["site-1", "site-2", "site-3"], 2)
    assert [case.size_mb for case in sites.cases[:2]] == [0.01, 0.01]  # what does not depend on the model
    assert sites.cases[-1].settings() == {"size_mb": "10", "clients": "3", "rounds": "5"}
    assert told[0] == "local: 3 sites start"
    assert told[-1] == "flower: 10 MB, its own FedAvg"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sites": 0}, "sites must be ≥ 1, not 0"),
        ({"ranks": -1}, "ranks must be ≥ 1, not -1"),
        ({"rounds": 0}, "rounds must be ≥ 1, not 0"),
        ({"sizes": []}, "sizes are megabytes"),
        ({"sizes": [0.0]}, "more than 0.01"),
        ({"engines": ["floewr"]}, "did you mean 'flower'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        measure_sites(**wrong)


def test_the_command_shows_a_table_or_json(monkeypatch, opened):
    monkeypatch.setattr(shoal.bench.sites, "_open", opened)
    command = ["bench", "sites", "--sizes", "1,100", "--engine", "nvflare", "--baseline"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1][:6] == ["nvflare", "1", "1.00", "0.25", "0.75", "7"]
    assert rows[4][:6] == ["nvflare", "FedAvg", "100", "1.00", "–", "0.75"]
    done = CliRunner().invoke(app, [*command, "--json"])
    found = json.loads(done.stdout)
    assert [(row["size_mb"], row["own"]) for row in found] == [(1, False), (1, True), (100, False), (100, True)]


def test_sizes_must_be_numbers():
    done = CliRunner().invoke(app, ["bench", "sites", "--sizes", "1;2"])
    assert done.exit_code == 2
    assert "numbers with commas between" in done.output


def test_local_sites_are_measured():
    costs = measure_sites(sizes=[0.5], sites=2, rounds=1)
    assert len(costs) == 1
    assert 0 < costs[0].training_seconds < costs[0].seconds
    assert costs[0].overhead_seconds > 0
    assert costs[0].bytes_moved == 4 * 500_000


@pytest.mark.parametrize("megabytes", [0.01, 9.3])
def test_a_payload_is_as_large_as_it_is_asked_to_be(megabytes):
    experiment = build(load("payload"), {"size_mb": str(megabytes), "clients": "3"})
    model = experiment.learner.init(0)
    assert nbytes(model.params) == round(megabytes * 1e6)
    assert [experiment.clients.name(client) for client in range(3)] == ["site-1", "site-2", "site-3"]


def test_all_of_a_payload_is_trained():
    experiment = build(load("payload"), {"size_mb": "9"})
    model = experiment.learner.init(0)
    update = experiment.learner.fit(Broadcast(round=1, model=model), experiment.clients[0], np.random.default_rng(0))
    assert all(bool((delta != 0).all()) for delta in update.delta.values())


def test_a_payload_of_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="size_mb must be at least 0.001"):
        build(load("payload"), {"size_mb": "0.0001"})


def test_the_memory_of_a_server_and_its_children():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    inner = "data = bytes(60_000_000); data = bytearray(data); print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, inner], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            with ServerMemory(os.getpid()) as memory:
                assert process.pid in descendants(os.getpid())
                assert len(descendants(process.pid)) == 2
            assert memory.most < 30e6  # they had it before
        finally:
            process.stdin.close()
            process.kill()


def test_memory_that_a_process_has_taken_meanwhile():
    with ServerMemory(os.getpid()) as memory:
        data = np.ones(8_000_000)
        del data
    assert 60e6 < memory.most < 200e6
    assert 0 < resident() <= most_resident()
    assert most_resident(2**22 + 1) == 0  # there is no such process
