"""Jobs on NVFlare as it is: in its simulator, and on a server with clients in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from process_table import eventually
from shoal.deploy import nvflare_local
from shoal.deploy.nvflare_job import write_job
from shoal.deploy.nvflare_local import commands, down, up
from shoal.deploy.nvflare_project import SERVER, kits, site_folder
from shoal.deploy.nvflare_submit import simulate, submit
from shoal.deploy.private_site import write_site
from shoal.deploy.site_settings import Allowed
from shoal.deploy.started import MARK, StartedProcesses
from shoal.errors import ConfigurationError, EngineError
from shoal.experiments.remote import Order
from shoal.processes.table import marked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # What is started for a folder is meant to live on.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

SITES = ["hospital-a", "hospital-b"]

SYNTHETIC = Order(experiment="synthetic", name="synthetic", settings={"clients": "2", "cohort": "2", "rounds": "2"})


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Has the processes of NVFlare find the echo, and this copy of shoal."""
    here = Path(__file__).parents[1]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here), str(here.parent / "src"), before]))
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """A server, two clients, and their sites."""
    folder = tmp_path_factory.mktemp("nvflare")
    allowed = [Allowed(name="synthetic", source="synthetic", settings=("*",))]
    starting = {site: write_site(site_folder(folder, site), site, allowed) for site in SITES}
    up(folder, SITES, starting, within=120)
    yield folder
    assert StartedProcesses(folder).stop(within=20) == []
    assert marked(MARK, str(folder)) == []


def echo_job(folder, *, count=2, **order):
    order = {"experiment": "echo", "name": "echo", "clients": count, "turns": 2, "size": 10, **order}
    echo = "nvflare_echo.EchoController", "nvflare_echo.EchoExecutor"
    write_job(
        folder, order=json.dumps(order), name="echo", min_clients=count, controller=echo[0], executor=echo[1]
    )  # fmt: skip
    return folder


def turns_of(run):
    return json.loads((run / "turns.json").read_text())


def check(run, names, size=10):
    """Makes sure that each client answered each turn with twice what it was sent."""
    turns = turns_of(run)
    assert [turn["turn"] for turn in turns] == [0, 1]
    for turn in turns:
        assert sorted(turn["answers"]) == sorted(names)
        for meta, total in turn["answers"].values():
            assert meta["turn"] == turn["turn"]
            assert total == 2 * (size * (size - 1) / 2 + size * turn["turn"])


def test_the_simulator_gives_each_turn_of_a_client_a_new_process(tmp_path):
    said = []
    run = simulate(echo_job(tmp_path / "job"), tmp_path / "ws", 2, threads=1, show=said.append, within=240)
    check(run, ["site-1", "site-2"])
    first, second = ({name: meta["process"] for name, (meta, _) in turn["answers"].items()} for turn in turns_of(run))
    assert set(first.values()).isdisjoint(second.values())
    assert [line.split(" took")[0] for line in said] == ["turn 0", "turn 1"]


def test_a_run_that_fails_in_the_simulator_says_why(tmp_path):
    with pytest.raises(EngineError, match="this run was to fail"):
        simulate(echo_job(tmp_path / "job", fail=True), tmp_path / "ws", 2, within=240)


def test_a_federation_in_the_simulator_starts_sites_that_end_with_it(tmp_path):
    said = []
    job = tmp_path / "job"
    order = dataclasses.replace(SYNTHETIC, settings={**SYNTHETIC.settings, "rounds": "1"})
    write_job(job, order=order.to_json(), name="synthetic", min_clients=2)
    run = simulate(job, tmp_path / "ws", 2, threads=1, show=said.append, within=500)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert any(line.startswith("round 1/1") for line in said)
    for name in ("site-1", "site-2"):
        [attendant] = (tmp_path / "ws" / name).glob("**/attendant.json")
        pid = json.loads(attendant.read_text())["pid"]
        assert eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists(), seconds=30)


def test_messages_come_and_go_on_a_server(deployment, tmp_path):
    said = []
    run = submit(deployment, echo_job(tmp_path / "job"), show=said.append, within=200)
    check(run, SITES)
    assert [line.split(" took")[0] for line in said[1:]] == ["turn 0", "turn 1"]
    assert turns_of(run)[1]["seconds"] < 2


def test_a_large_model_travels(deployment, tmp_path):
    size = 4_000_000
    run = submit(deployment, echo_job(tmp_path / "job", size=size), show=print, within=300)
    assert len(turns_of(run)) == 2


@pytest.mark.parametrize(
    ("order", "text"),
    [({"fail": True}, "this run was to fail"), ({"meta": {"fail": True}}, "hospital-[ab]: this site was to fail")],
)
def test_a_run_that_fails_on_a_server_says_why(deployment, tmp_path, order, text):
    with pytest.raises(EngineError, match=text):
        submit(deployment, echo_job(tmp_path / "job", **order), show=print, within=200)


def test_a_job_that_takes_too_long_is_aborted(deployment, tmp_path):
    job = echo_job(tmp_path / "job", turns=100, meta={"sleep": 2})
    with pytest.raises(EngineError, match="has not ended within 12 s, and is aborted"):
        submit(deployment, job, show=print, within=12)
    assert eventually(lambda: not job_processes(deployment), seconds=60)


def test_ctrl_c_aborts_the_job(deployment, tmp_path):
    def show(line):
        if line.startswith("turn"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(deployment, echo_job(tmp_path / "job", turns=100, meta={"sleep": 1}), show=show, within=200)
    assert eventually(lambda: not job_processes(deployment), seconds=60)


def test_a_federation_of_sites_that_allow_no_code_of_jobs(deployment, tmp_path):
    """The job brings none, and the clients allow shoal's components by name."""
    said = []
    job = tmp_path / "job"
    write_job(job, order=SYNTHETIC.to_json(), name="synthetic", sites=SITES, min_clients=2, own_code=False)
    run = submit(deployment, job, show=said.append, within=300)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "model.safetensors").exists()
    assert any(line.startswith("round 2/2") for line in said)


def test_what_a_site_does_not_allow_ends_the_job(deployment, tmp_path):
    job = tmp_path / "job"
    order = dataclasses.replace(SYNTHETIC, name="other")
    write_job(job, order=order.to_json(), name="other", sites=SITES, min_clients=2, own_code=False)
    with pytest.raises(EngineError, match="other"):
        submit(deployment, job, show=print, within=300)


def test_administrators_are_told_what_to_type(deployment):
    told = "\n".join(commands(deployment))
    assert "nvflare provision" in told
    for site in SITES:
        assert str(kits(deployment) / site) in told


def test_stopping_ends_the_processes_of_a_running_job_and_a_new_start_runs_others(tmp_path):
    folder = tmp_path / "deployment"
    up(folder, ["site-1"], {}, within=120)
    submitted = threading.Thread(target=submit_and_fail, args=(folder, tmp_path / "job"), daemon=True)
    try:
        submitted.start()
        assert eventually(lambda: len(job_processes(folder)) == 2, seconds=60)
    finally:
        down(folder, within=20)
    assert marked(MARK, str(folder)) == []
    up(folder, ["site-1"], {}, within=120)
    try:
        submit(folder, echo_job(tmp_path / "next", count=1), show=print, within=100)
    finally:
        down(folder, within=20)


def submit_and_fail(folder, job):
    try:
        submit(folder, echo_job(job, count=1, turns=100, meta={"sleep": 1}), show=print, within=60)
    except EngineError:
        return


def job_processes(folder):
    """Returns the processes that a deployment has for its jobs."""
    found = []
    for pid in marked(MARK, str(folder)):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"runner_process" in command or b"worker_process" in command:
            found.append(pid)
    return found


def test_what_cannot_be_started_leaves_nothing_behind(tmp_path):
    with pytest.raises(EngineError, match=r"site-a has ended:[\s\S]*no such site"):
        up(tmp_path, ["a"], {"a": ["sh", "-c", "echo no such site; exit 3"]}, within=60)
    assert marked(MARK, str(tmp_path)) == []
    with pytest.raises(ConfigurationError, match="neither a deployment"):
        submit(tmp_path / "nothing", tmp_path, show=print, within=10)


@pytest.mark.parametrize(("left_out", "within"), [("nvflare-a", 15), (f"nvflare-{SERVER}", 1)])
def test_who_is_not_there_in_time_is_told(tmp_path, monkeypatch, left_out, within):
    all_of = nvflare_local.participants

    def participants(*asked):
        return {name: command for name, command in all_of(*asked).items() if name != left_out}

    monkeypatch.setattr(nvflare_local, "participants", participants)
    begun = time.monotonic()
    with pytest.raises(EngineError, match="in time"):
        up(tmp_path, ["a"], {}, within=within)
    assert time.monotonic() - begun < 60
    assert marked(MARK, str(tmp_path)) == []
