"""Federations of real sites over Flower as it is: TLS, keys, two sites of two ranks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("flwr")

from engine_experiment import SITES, expected_weights, ranks_of
from engine_runs import FILE, Run, cmdline, exported_and_submitted, ranks_at
from process_table import alive, eventually
from shoal.deploy.certificates import write_node_key, write_server_certificates
from shoal.deploy.flower_app import write_app
from shoal.deploy.flower_local import commands, down, up
from shoal.deploy.flower_submit import submit
from shoal.deploy.flower_supernode import without_app_code
from shoal.deploy.flower_tools import CONNECTION, HOME, environment, tool
from shoal.deploy.private_site import write_site
from shoal.deploy.site_settings import Allowed
from shoal.deploy.started import MARK, StartedProcesses
from shoal.errors import EngineError
from shoal.processes.ports import free_ports
from shoal.processes.table import marked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.xdist_group("flower"),
    # What is started for a folder is meant to live on.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """A SuperLink, two SuperNodes, and their sites."""
    folder = tmp_path_factory.mktemp("flower")
    allowed = [Allowed(name="two", source=str(FILE), settings=("*",))]
    starting = {name: write_site(folder / "sites" / name, name, allowed) for name in SITES}
    up(folder, list(SITES), starting, within=200)
    yield folder
    down(folder)
    assert marked(MARK, str(folder)) == []


def run_of(deployment, folder, **settings):
    """Returns a federation that is yet to be started."""

    def submitted(order, scratch, show):
        write_app(scratch, order=order.to_json(), name="two", files={})
        # No site runs what whoever submits an app has put into it.
        (scratch / "client_app.py").write_text(f"app = open({str(folder / 'ran')!r}, 'w')\nraise SystemExit(1)\n")
        submit(deployment, scratch, connection=CONNECTION, show=show, within=280)

    return Run(submitted, folder, **settings)


@contextlib.contextmanager
def stranger(deployment, folder, *words):
    """A SuperNode that should not be let in; gives what it has written."""
    log = folder / "stranger.log"
    facts = json.loads((deployment / "flower.json").read_text())
    command = [tool("flower-supernode"), "--superlink", f"127.0.0.1:{facts['port']}", *map(str, words)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(folder / "home"), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield lambda: log.read_text(errors="replace")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def test_the_result_is_that_of_the_definition_whoever_else_comes(deployment, tmp_path):
    """One with a key that nobody registered, one that trusts another authority, and one without TLS are refused."""
    own = deployment / "certificates" / "ca.crt"
    write_server_certificates(tmp_path / "other", ["127.0.0.1"])
    for name in ("unregistered", "wrong", "plain"):
        (tmp_path / name).mkdir()
    write_node_key(tmp_path, "nobody")
    key = ["--auth-supernode-private-key", tmp_path / "nobody"]
    port = ["--port", *free_ports(1)]
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        told = {
            "unregistered": enter(
                stranger(deployment, tmp_path / "unregistered", "--root-certificates", own, *key, *port)
            ),
            "wrong": enter(
                stranger(
                    *(deployment, tmp_path / "wrong", "--root-certificates", tmp_path / "other" / "ca.crt", *key),
                    *("--port", *free_ports(1)),
                )
            ),
            "plain": enter(stranger(deployment, tmp_path / "plain", "--insecure", "--port", *free_ports(1))),
        }
        run = run_of(deployment, tmp_path).start()
        np.testing.assert_allclose(run.end(), expected_weights(), atol=1e-6)
        assert not (tmp_path / "ran").exists()
        time.sleep(2)
        for name, said in told.items():
            assert "ERROR" in said() or "WARN" in said() or "Traceback" in said(), (name, said())
    assert len(ranks_of(run.pids)) == 2 * 2 + 2, "they were started once: two ranks and a launcher for each site"
    assert eventually(lambda: not [pid for pid in ranks_of(run.pids) if alive(pid)], 30), "they end with the run"
    assert [record["failed"] for record in run.records()] == [[]] * 3
    for name in SITES:
        assert_recorded(deployment / "sites" / name / "audit.jsonl")
    assert any("flower-superlink" in line for line in commands(deployment))


def assert_recorded(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    own = [line for line in lines if line.get("kind") == "train"]
    assert [line["round"] for line in own[-3:]] == [1, 2, 3]
    assert own[-1]["sent"]["arrays"]["w"]["shape"] == [5]


def test_an_exported_app_comes_home_as_a_run(deployment, tmp_path):
    """For whoever submits it, the SuperLink is one that Flower's own configuration names."""
    run = exported_and_submitted(tmp_path, "flower", CONNECTION, FLWR_HOME=str(deployment / HOME))
    np.testing.assert_allclose(load_file(run / "model.safetensors")["w"], expected_weights(), atol=1e-6)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_rank_that_is_killed_is_started_again_and_nothing_is_lost(deployment, tmp_path):
    run = run_of(deployment, tmp_path, pause=1.0, rounds=2, on_failure="restart").start()
    assert eventually(lambda: len(ranks_of(run.pids)) == 6, 200)
    time.sleep(random.uniform(0, 6))
    if ranks := ranks_at("site-2", run.pids):  # none where it has ended meanwhile
        os.kill(random.choice(ranks), signal.SIGKILL)
    np.testing.assert_allclose(run.end(), expected_weights(2), atol=1e-6)


def test_a_site_that_goes_away_in_a_round_and_comes_back_joins_a_later_one(deployment, tmp_path):
    """All of a site is killed: its SuperNode, its own process, its ranks. The round goes on with the other one."""
    run = run_of(deployment, tmp_path, pause=1.0, rounds=6, min_sites=1).start()
    run.wait_for_round(1)
    started = StartedProcesses(deployment)
    pids = started.pids()
    entries = json.loads((deployment / "processes.json").read_text())
    for name in ("supernode-site-2", "site-site-2"):
        os.kill(pids[name], signal.SIGKILL)
    assert eventually(lambda: not started.alive()["site-site-2"] and not started.alive()["supernode-site-2"], 10)
    run.wait_for_round(2)
    env = without_app_code(deployment / "sites" / "site-2", environment(deployment / HOME))
    for name in ("site-site-2", "supernode-site-2"):
        started.start(name, entries[name]["command"], env=env, cwd=deployment)
    found = run.end()
    missed = [record["round"] for record in run.records() if record["failed"]]
    assert [record["failed"] for record in run.records() if record["failed"]] == [[1]] * len(missed)
    there = [number for number in range(1, 7) if number not in missed]
    assert missed
    assert there[-1] > missed[0]
    np.testing.assert_allclose(found, expected_weights(6, {"site-2": there}), atol=1e-6)


def test_a_server_that_is_killed_goes_on_from_its_run_folder(deployment, tmp_path):
    run = run_of(deployment, tmp_path, pause=0.5).start()
    run.wait_for_round(1)
    before = ranks_of(run.pids)
    servers = [pid for pid in marked(MARK, str(deployment)) if any(b"flwr-serverapp" in word for word in cmdline(pid))]
    assert servers
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="did not complete"):
        run.end()
    run.error = None
    np.testing.assert_allclose(run.start(resume=True).end(), expected_weights(), atol=1e-6)
    assert [record["round"] for record in run.records()] == [1, 2, 3]
    assert set(ranks_of(run.pids)) == set(before), "the sites go on with the ranks they have"
