"""Federations of real sites over NVFlare as it is: simulator, POC, and a provisioned server with TLS."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("nvflare")

from engine_experiment import SITES, expected_weights, experiment, ranks_of
from engine_runs import FILE, Run, cmdline, exported_and_submitted, ranks_at
from process_table import alive, eventually
from shoal.deploy.nvflare_job import RUN, write_job
from shoal.deploy.nvflare_local import down, up
from shoal.deploy.nvflare_project import ADMIN, environment, kits, site_folder
from shoal.deploy.nvflare_submit import simulate, submit
from shoal.deploy.private_site import write_site
from shoal.deploy.site_settings import Allowed
from shoal.deploy.started import MARK, StartedProcesses
from shoal.errors import EngineError
from shoal.processes.table import marked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.xdist_group("nvflare"),
    # What is started for a folder is meant to live on.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Has the processes of NVFlare find this copy of shoal."""
    before = os.environ.get("PYTHONPATH")
    source = str(Path(__file__).parents[2] / "src")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [source, before]))
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """A server, two clients, and their sites."""
    folder = tmp_path_factory.mktemp("nvflare")
    allowed = [Allowed(name="two", source=str(FILE), settings=("*",))]
    starting = {name: write_site(site_folder(folder, name), name, allowed) for name in SITES}
    up(folder, list(SITES), starting, within=200)
    yield folder
    down(folder, within=20)
    assert marked(MARK, str(folder)) == []


def run_of(deployment, folder, **settings):
    """Returns a federation that is yet to be started."""

    def submitted(order, scratch, show):
        write_job(scratch, order=order.to_json(), name="two", min_clients=int(settings.get("min_sites", 2)))
        submit(deployment, scratch, show=show, within=280, run_dir=Path(order.run_dir))

    return Run(submitted, folder, **settings)


@pytest.fixture
def exported(tmp_path):
    """A job that brings all that it needs, as ``--export_config`` writes it."""
    pids = tmp_path / "pids"
    pids.mkdir()
    experiment(pids=str(pids)).export(tmp_path / "job")
    return tmp_path / "job"


def assert_as_expected(run, pids):
    np.testing.assert_allclose(load_file(run / "model.safetensors")["w"], expected_weights(), atol=1e-6)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert eventually(lambda: not [pid for pid in ranks_of(pids) if alive(pid)], 30)
    assert len(ranks_of(pids)) == 2 * 2 + 2, "the ranks were started once"


def test_an_exported_job_runs_in_the_simulator(exported, tmp_path):
    run = simulate(exported, tmp_path / "workspace", list(SITES), show=print, within=280)
    assert_as_expected(run, tmp_path / "pids")


def test_an_exported_job_runs_under_poc(exported, tmp_path):
    # NVFlare's scripts look for python3 on the path.
    own = Path(sys.executable).parent
    path = os.pathsep.join([str(own), os.environ.get("PATH", os.defpath)])
    env = environment() | {"NVFLARE_POC_WORKSPACE": str(tmp_path / "poc"), "HOME": str(tmp_path), "PATH": path}
    tool = str(own / "nvflare")

    def nvflare(*words, within=120):
        done = subprocess.run(
            [tool, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=within, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    nvflare("poc", "prepare", "-n", "2")
    with (tmp_path / "poc.log").open("wb") as log:
        poc = subprocess.Popen(
            [tool, "poc", "start", "-ex", "admin@nvidia.com"], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        said = ""
        until = time.monotonic() + 120
        while "job_id" not in said and time.monotonic() < until:
            time.sleep(5)
            done = subprocess.run(
                [tool, "job", "submit", "-j", str(exported)], cwd=tmp_path, env=env, capture_output=True,
                text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            said = done.stdout
        assert "job_id" in said, said + done.stderr
        number = said.split("job_id:")[1].split()[0].strip('",') if "job_id:" in said else json.loads(said)["job_id"]
        nvflare("job", "wait", number, within=240)
        nvflare("job", "download", number, within=120)
    finally:
        subprocess.run([tool, "poc", "stop"], cwd=tmp_path, env=env, timeout=90, check=False, capture_output=True)
        poc.terminate()
        poc.wait(30)
        for pid in marked("NVFLARE_POC_WORKSPACE", str(tmp_path / "poc")):
            os.kill(pid, signal.SIGKILL)
    [run] = tmp_path.glob(f"**/{number}/workspace/{RUN}")
    assert_as_expected(run, tmp_path / "pids")


def test_the_result_on_a_server_is_that_of_the_definition(deployment, tmp_path):
    run = run_of(deployment, tmp_path).start()
    np.testing.assert_allclose(run.end(), expected_weights(), atol=1e-6)
    assert len(ranks_of(run.pids)) == 2 * 2 + 2


def test_an_exported_job_comes_home_as_a_run(deployment, tmp_path):
    """For whoever submits it, the server is one that an administrator's startup kit leads to."""
    assert_as_expected(exported_and_submitted(tmp_path, "nvflare", kits(deployment) / ADMIN), tmp_path / "pids")


def test_a_rank_that_is_killed_is_started_again_and_nothing_is_lost(deployment, tmp_path):
    run = run_of(deployment, tmp_path, pause=1.0, on_failure="restart").start()
    assert eventually(lambda: len(ranks_of(run.pids)) == 6, 200)
    time.sleep(random.uniform(0, 5))
    if ranks := ranks_at("site-2", run.pids):  # none where it has ended meanwhile
        os.kill(random.choice(ranks), signal.SIGKILL)
    np.testing.assert_allclose(run.end(), expected_weights(), atol=1e-6)


def test_a_site_whose_process_is_killed_and_comes_back_joins_a_later_round(deployment, tmp_path):
    run = run_of(deployment, tmp_path, pause=1.0, rounds=6, min_sites=1).start()
    run.wait_for_round(1)
    started = StartedProcesses(deployment)
    entry = json.loads((deployment / "processes.json").read_text())["site-site-2"]
    os.kill(started.pids()["site-site-2"], signal.SIGKILL)
    assert eventually(lambda: not started.alive()["site-site-2"], 10)
    run.wait_for_round(2)
    started.start("site-site-2", entry["command"], env=environment(), cwd=deployment)
    found = run.end()
    missed = [record["round"] for record in run.records() if record["failed"]]
    there = [number for number in range(1, 7) if number not in missed]
    np.testing.assert_allclose(found, expected_weights(6, {"site-2": there}), atol=1e-6)


def test_a_server_that_is_killed_goes_on_from_its_run_folder(deployment, tmp_path):
    run = run_of(deployment, tmp_path, pause=0.5).start()
    run.wait_for_round(1)
    servers = [pid for pid in marked(MARK, str(deployment)) if any(b"runner_process" in word for word in cmdline(pid))]
    assert servers
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError):
        run.end()
    run.error = None
    np.testing.assert_allclose(run.start(resume=True).end(), expected_weights(), atol=1e-6)
    assert [record["round"] for record in run.records()] == [1, 2, 3]
