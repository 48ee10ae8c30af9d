"""Federations of real sites over a wire: equal to local ones, and whole whatever is killed on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # which each fork would import at its first step

import shoal
import shoal.federation.job
from process_table import alive, eventually
from remote_sites import EXPERIMENTS, Forked, LocalWire, SiteProcesses, keep_only
from shoal.deploy import asking, roster
from shoal.deploy.parcel import Parcel, raw
from shoal.deploy.site_settings import Allowed, Limits
from shoal.errors import ClientError, ConfigurationError, SiteError
from shoal.experiments.loading import build, load
from shoal.experiments.remote import Order, run_over
from shoal.federation import run_experiment
from shoal.processes.forking import fork
from site_jobs import SCRIPT, start_quickly
from support import assert_equal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

NAMES = ("site-1", "site-2")

ANY = Allowed(name="any", source=str(EXPERIMENTS), settings=("*",))


@pytest.fixture
def quick(monkeypatch):
    """Makes all that is started a fork of this process, and what is lost is asked for again soon."""
    monkeypatch.setattr(shoal.federation.job, "start_script", start_quickly)
    monkeypatch.setattr(asking, "BUSY", 0.5)
    monkeypatch.setattr(roster, "AGAIN", 0.5)
    monkeypatch.setattr(roster, "CENSUS", 0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sites(tmp_path, quick):
    """Two sites that allow any experiment of the tests; at the end none of their processes is left."""
    sites = SiteProcesses(tmp_path / "sites", quick=True)
    try:
        for name in NAMES:
            sites.write(name, ANY)
            sites.start(name)
        yield sites
    finally:
        left = sites.stop()
    assert left == []


@pytest.fixture
def wire(sites):
    wire = LocalWire({name: sites.folder / name for name in NAMES})
    yield wire
    wire.close()


class Rounds(shoal.Callback):
    """Calls a function at the end of each round."""

    def __init__(self, act):
        self.act = act

    def on_round_end(self, record):
        self.act(record)


def order(run_dir="", resume=False, **settings):
    return Order(experiment=str(EXPERIMENTS), name="any", settings=settings, run_dir=str(run_dir), resume=resume)


def locally(engine=None, **settings):
    """Returns the result of the same experiment on this machine alone."""
    experiment = build(load(str(EXPERIMENTS)), settings)
    if engine is not None:
        experiment = dataclasses.replace(experiment, engine=engine)
    return run_experiment(experiment)


def bits(result):
    return {name: bytes(raw(array).data) for name, array in result.params.items()}


def script(folder, pause=0.0, faults=None, sites=None, waits=None, **job):
    """Returns the settings of a job whose sites run a script."""
    (folder / "pids").mkdir(exist_ok=True)
    told = {"pids": str(folder / "pids"), "faults": faults or {}, "pause": pause, "evaluate": False}
    told = {"script": told, "sites": sites or {"site-1": 2, "site-2": 1}, "job": job, "waits": waits or {}}
    return {"kind": "script", "told": json.dumps(told)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"algorithm": "fedprox", "algorithm.mu": "0.3"},
        {"algorithm": "fedadam", "algorithm.server_lr": "0.05"},
        {"kind": "bfloat16"},
    ],
    ids=lambda settings: "-".join(settings.values()).replace(".", "") or "plain",
)
def test_a_federation_of_sites_is_that_of_one_process(wire, settings):
    result = run_over(wire, order(**settings))
    alone = locally("sequential", **settings)
    assert bits(result) == bits(alone)
    timeless = [{key: record[key] for key in ("round", "loss", "examples")} for record in alone.history]
    assert [{key: record[key] for key in ("round", "loss", "examples")} for record in result.history] == timeless


def test_a_script_at_sites_replies_as_at_home(wire, sites, tmp_path):
    """With the bits of local sites; and each site has a line of what went in and out for each task."""
    settings = script(tmp_path)
    result = run_over(wire, order(tmp_path / "run", **settings))
    assert bits(result) == bits(locally(**settings))
    assert eventually(lambda: not any(sites.below(name) for name in NAMES))
    delivered = hashlib.sha256(result.params["w"].tobytes()).hexdigest()
    shapes = {"dtype": "float32", "shape": [5]}
    for name in NAMES:
        lines = sites.audit(name)
        assert [(line["kind"], line["round"], line["experiment"]) for line in lines] == [
            ("train", number, "any") for number in (1, 2, 3)
        ]
        for line in lines:
            for way, array in (("received", "params/w"), ("sent", "w")):
                entry = line[way]["arrays"].pop(array)
                assert line[way]["arrays"] == {}
                assert {key: entry[key] for key in shapes} == shapes
                assert line[way]["bytes"] == 20
            assert line["sent"]["metrics"] == {"loss": float(line["round"])}
            assert line["sent"]["examples"] == int(name[-1])
    assert delivered not in (tmp_path / "sites" / "site-1" / "audit.jsonl").read_text()  # nobody trained on the last


def test_hashes_are_those_of_what_was_sent(sites, wire, tmp_path):
    told = []

    class Watched(LocalWire):
        def send(self, to, parcel):
            if parcel.tensors:
                told.append({name: hashlib.sha256(array.data).hexdigest() for name, array in parcel.tensors.items()})
            return super().send(to, parcel)

        def receive(self, seconds):
            for ticket, answer in super().receive(seconds):
                if isinstance(answer, Parcel) and answer.tensors:
                    said = {name: hashlib.sha256(array.data).hexdigest() for name, array in answer.tensors.items()}
                    heard.setdefault(answer.meta["site"], []).append(said)
                yield ticket, answer

    heard = {}
    watched = Watched(wire.folders)
    with contextlib.closing(watched):
        run_over(watched, order(rounds="2"))
    for name in NAMES:
        lines = [line for line in sites.audit(name) if line["kind"] == "train"]
        received = [{key: entry["sha256"] for key, entry in line["received"]["arrays"].items()} for line in lines]
        sent = [{key: entry["sha256"] for key, entry in line["sent"]["arrays"].items()} for line in lines]
        assert received == told
        assert sent == heard[name]
        assert all(entry["norm"] >= 0 for line in lines for entry in line["sent"]["arrays"].values())


def test_lost_answers_change_nothing(wire, sites, tmp_path):
    settings = script(tmp_path)

    def lose(record):
        wire.lost = record["round"]

    wire.lost = 3
    result = run_over(wire, order(**settings), [Rounds(lose)])
    assert bits(result) == bits(locally(**settings))
    asked = [number for kind, number, address in wire.sent if kind == "train" and address == "site-1"]
    both = len([one for one in wire.sent if one[0] == "train"])
    assert both > 6
    assert len(set(asked)) == 3  # again, and each under its number
    for name in NAMES:
        trained = [line["sent"]["arrays"]["w"]["sha256"] for line in sites.audit(name)]
        assert len(set(trained)) == 3


def test_a_rank_that_is_killed_is_started_again(wire, sites, tmp_path):
    fault = {"site-1": {"does": "kill", "rank": 1, "round": 2}}
    settings = script(tmp_path, faults=fault, on_failure="restart")
    result = run_over(wire, order(**settings))
    assert bits(result) == bits(locally(**script(tmp_path)))


def test_a_rank_that_is_killed_stops_a_run_that_says_so(wire, sites, tmp_path):
    settings = script(tmp_path, faults={"site-1": {"does": "kill", "rank": 1, "round": 2}})
    with pytest.raises(SiteError, match=r"^site-1: rank 1 \(process \d+\) was ended by SIGKILL in round [23]"):
        run_over(wire, order(**settings))
    assert eventually(lambda: not any(sites.below(name) for name in NAMES), 20)


def test_a_run_process_that_is_killed_is_started_again(wire, sites, tmp_path):
    settings = script(tmp_path, pause=0.5, on_failure="restart")
    killed = []

    def kill(record):
        if record["round"] == 1:
            killed.extend(sites.below("site-1"))
            os.kill(killed[0], signal.SIGKILL)

    result = run_over(wire, order(**settings), [Rounds(kill)])
    assert bits(result) == bits(locally(**script(tmp_path)))
    assert eventually(lambda: not any(map(alive, killed)), 20)


def test_a_run_process_that_ends_between_two_tasks_stops_a_run_that_says_so(wire, sites, tmp_path):
    """New ranks would have lost what the old ones had, such as the state of their optimizers, without a word."""

    def kill(record):
        if record["round"] == 1:
            process = sites.below("site-1")[0]
            os.kill(process, signal.SIGKILL)
            assert eventually(lambda: not alive(process), 10)

    with pytest.raises(SiteError, match=r"^site-1: the run's process at this site was killed by SIGKILL"):
        run_over(wire, order(**script(tmp_path)), [Rounds(kill)])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_site_that_is_killed_and_comes_back_goes_on(wire, sites, tmp_path, number):
    """Its ranks end at once, also in the midst of a task; in the same folder it goes on."""
    settings = script(tmp_path, pause=1.0)
    gone, ended = [], []

    def kill():
        time.sleep(0.3)
        gone.extend(sites.below("site-2"))
        sites.kill("site-2", number)
        ended.append(eventually(lambda: not any(map(alive, gone)), 10))
        sites.start("site-2")

    thread = threading.Thread(target=kill)
    result = run_over(wire, order(**settings), [Rounds(lambda record: record["round"] == 1 and thread.start())])
    thread.join(30)
    assert len(gone) >= 3  # the run's process, a launcher and a rank
    assert ended == [True]
    assert bits(result) == bits(locally(**script(tmp_path)))


def test_a_site_that_goes_is_left_out_and_joins_again(wire, sites, tmp_path):
    settings = script(tmp_path, pause=0.4, min_sites=1, on_failure="continue")
    threads = []

    def act(record):
        if record["round"] == 1:
            threads.append(threading.Thread(target=lambda: sites.kill("site-2")))
            threads[-1].start()
        if record["round"] == 3:
            threads[0].join(10)
            sites.start("site-2")
            time.sleep(1.0)

    result = run_over(wire, order(**settings, rounds="6"), [Rounds(act)])
    clients = [record["clients"] for record in result.history]
    assert clients[0] == 2
    assert clients[2] == 1
    assert clients[-1] == 2


def test_a_late_site_is_left_out_after_the_deadline(wire, sites, tmp_path):
    """And what it does meanwhile is not done once for every round that went on without it."""
    fault = {"site-2": {"does": "slow", "round": 2}}
    settings = script(tmp_path, pause=0.2, faults=fault, min_sites=1, deadline=1.5)
    result = run_over(wire, order(**settings, rounds="8"))
    clients = [record["clients"] for record in result.history]
    assert clients[0] == 2
    assert clients[1] == 1
    assert clients[-1] == 2
    done = [line["round"] for line in sites.audit("site-2") if "error" not in line]
    assert 3 not in done  # it was at round 2 then, and found a newer one at its end


def test_sites_that_never_come_are_told_by_name(sites, wire, tmp_path):
    sites.kill("site-2", signal.SIGTERM)
    settings = script(tmp_path, waits={"start": 1.5})
    started = time.monotonic()
    with pytest.raises(SiteError, match=r"of 2 sites 1 did not come within 1.5 s: site-2; see to it that `shoal site`"):
        run_over(wire, order(**settings))
    assert time.monotonic() - started < 10


def test_a_site_whose_process_never_comes_back_stops_the_run(sites, wire, tmp_path):
    """Though what carries the messages still says that it is there."""
    settings = script(tmp_path, waits={"start": 3}, pause=0.3)

    def kill(record):
        if record["round"] == 1:
            sites.kill("site-2")

    with pytest.raises(
        SiteError, match="^site-2 is gone, and did not come back within 3 s; last was said: .*cannot be"
    ):
        run_over(wire, order(**settings), [Rounds(kill)])


REFUSED = {
    "another experiment": ({"allow": Allowed(name="other", source="digits")}, {}, "does not allow an experiment any"),
    "a setting": (
        {"allow": dataclasses.replace(ANY, settings=("rounds",))},
        {"kind": "plain"},
        "let a server set kind",
    ),
    "rounds": ({"limits": Limits(rounds=2)}, {}, "3 rounds were asked for, and it does at most 2"),
    "size": ({"limits": Limits(megabytes=0.0001)}, {}, "of the model|MB was sent, and it takes at most 0.0001"),
    "another version": (
        {"allow": dataclasses.replace(ANY, source="digits", settings=("*",))},
        {"rounds": "3"},
        "any here is not what the server has",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_site_refuses_ends_the_run_with_its_reason(sites, wire, kind):
    changes, settings, what = REFUSED[kind]
    sites.kill("site-2", signal.SIGTERM)
    sites.write("site-2", changes.get("allow", ANY), limits=changes.get("limits"))
    sites.start("site-2")
    error = SiteError if kind == "size" else ConfigurationError  # which it learns of with the first task
    with pytest.raises(error, match=f"^site-2 refuses: .*({what})"):
        run_over(wire, order(**settings))
    if kind != "another version":  # which only the run's process can tell
        (line,) = [line for line in sites.audit("site-2") if "refused" in line]
        assert line["kind"] in ("hello", "train")


def test_a_site_that_is_not_meant_does_not_disturb(sites, wire, tmp_path):
    wire.folders["site-3"] = sites.write("site-3", Allowed(name="other", source="digits"))
    sites.start("site-3")
    settings = script(tmp_path)
    assert bits(run_over(wire, order(**settings))) == bits(locally(**settings))


def test_a_site_that_works_for_another_run_is_waited_for(sites, wire, tmp_path):
    told = script(tmp_path, pause=0.3)
    run = tmp_path / "first"
    first = Forked(fork(lambda: served(wire.folders, told, run, False)))
    try:
        assert eventually((run / "metrics.jsonl").exists, 30)
        second = run_over(wire, order(**told))
        assert first.wait(30) == 0
    finally:
        first.kill()
    assert bits(second) == bits(locally(**told))
    assert np.load(f"{run}.npy").tobytes() == second.params["w"].tobytes()
    assert len([kind for kind, _, _ in wire.sent if kind == "hello"]) > 4  # it was told that they are busy


def served(folders, told, run_dir, resume):
    """Is a server, in a forked process."""
    os.setsid()
    with Path(f"{run_dir}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    keep_only()
    asking.BUSY = 0.5
    result = run_over(LocalWire(folders), order(run_dir, resume, **told))
    np.save(f"{run_dir}.npy", result.params["w"])
    os._exit(0)


def test_a_server_that_is_killed_goes_on_with_the_same_bits(sites, wire, tmp_path):
    settings = script(tmp_path, pause=0.2)
    told = {**settings, "rounds": "8"}
    run = tmp_path / "run"
    rng = np.random.default_rng(time.time_ns())
    killed = 0
    for attempt in range(4):
        server = Forked(fork(lambda resume=attempt > 0: served(wire.folders, told, run, resume)))
        try:
            if attempt < 3:
                eventually((run / "metrics.jsonl").exists, 30)
                with contextlib.suppress(Exception):
                    server.wait(float(rng.uniform(0.0, 1.0)))
                killed += server.poll() is None
            else:
                assert server.wait(60) == 0, (tmp_path / "run.log").read_text()
        finally:
            server.kill()
            server.wait(10)
    assert killed
    wanted = locally(**script(tmp_path), rounds="8").params["w"]
    assert np.load(f"{run}.npy").tobytes() == wanted.tobytes()
    rounds = [json.loads(line)["round"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, 9))
    attempts = json.loads((run / "sites" / "sites.json").read_text())["attempt"]
    assert attempts <= 3
    assert eventually(lambda: not any(sites.below(name) for name in NAMES), 20)


def test_a_run_goes_on_with_its_own_sites_alone(sites, wire, tmp_path):
    run_over(wire, order(tmp_path / "run", rounds="1", **script(tmp_path)))
    (tmp_path / "run" / "sites" / "sites.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="sites.json does not say which sites the run has"):
        run_over(wire, order(tmp_path / "run", True, rounds="2", **script(tmp_path)))


def test_too_few_sites_end_a_round(sites, wire, tmp_path):
    faults = {name: {"does": "raise", "round": 2} for name in NAMES}
    settings = script(tmp_path, faults=faults, min_sites=1, on_failure="continue")
    with pytest.raises(ClientError, match="site-[12] failed in round 2: .*exit code 1"):
        run_over(wire, order(**settings))
    assert SCRIPT.exists()


DDP = """
import sys
sys.path.insert(0, {folder!r})
from job import arguments, make


def experiment(*, rounds: int = 2):
    sys.argv[1:] = ["--num_rounds", str(rounds), "--images", "200", "--accelerator", "cpu"]
    return make(arguments())
"""


@pytest.mark.timeout(200)
def test_two_ranks_at_each_of_two_sites_are_those_of_a_local_job(tmp_path, monkeypatch):
    """With programs that are started as they would be on machines of their own: nothing is forked from this one."""
    folder = Path(shoal.__file__).parents[2] / "examples" / "multi_gpu" / "torch_ddp"
    file = tmp_path / "ddp.py"
    file.write_text(DDP.format(folder=str(folder)))
    monkeypatch.setattr("sys.argv", ["pytest"])
    sites = SiteProcesses(tmp_path / "sites")
    allowed = Allowed(name="ddp", source=str(file))
    wire = LocalWire({name: sites.write(name, allowed) for name in NAMES})
    try:
        for name in NAMES:
            sites.start(name)
        result = run_over(wire, Order(experiment=str(file), name="ddp", run_dir=str(tmp_path / "run")))
    finally:
        left = sites.stop()
        wire.close()
    assert left == []
    alone = run_experiment(build(load(str(file)), {}))
    assert_equal(result.params, alone.params, atol=1e-6)
    accuracies = [[record["accuracy"] for record in each.history] for each in (result, alone)]
    np.testing.assert_allclose(*accuracies, atol=1e-6)
