"""Trackers that follow a run from processes of their own: with the real libraries offline, and with one that fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.runs.metrics import MetricsLog, scalars
from shoal.runs.trackers import TrackerProcess, process
from shoal.runs.trackers.mlflow import _key
from tracked import mlflow_runs, processes_of, until, wandb_records

SITES = {"site-1": {"loss": 0.5}, "site-2": {"loss": float("nan")}}


def run_folder(path: Path) -> MetricsLog:
    path.mkdir()
    config = {
        "identity": {"name": "a/b", "algorithm": {"name": "FedAvg"}, "long": "x" * 9000},
        "options": {"rounds": 3},
    }
    (path / "config.json").write_text(json.dumps(config))
    return MetricsLog(path / "metrics.jsonl")


def record(round: int) -> dict[str, object]:
    return {"round": round, "failed": [], "loss": round / 8, "accuracy": float("nan"), "sites": SITES}


def follow(name: str, run: Path, ending: process.Ending = "finished", deadline: float | None = None) -> str | None:
    """Lets a tracker follow a run to its end; returns its notice."""
    tracker = TrackerProcess(name, run, deadline=deadline)
    tracker.poke()
    tracker.end(ending)
    tracker.close()
    return tracker.notice()


def test_a_record_is_its_numbers_and_those_of_its_sites():
    found = scalars({"round": 3, "failed": [2], "loss": None, "memory_bytes": [1], "sites": {"a": {"loss": 1}}})
    assert found == {"round": 3.0, "loss": pytest.approx(float("nan"), nan_ok=True), "a/loss": 1.0}


def test_null_stands_for_what_is_not_finite_within_sites_too(tmp_path):
    MetricsLog(tmp_path / "m").append({"round": 1, "sites": {"a": {"loss": float("inf")}}})
    assert json.loads((tmp_path / "m").read_text()) == {"round": 1, "sites": {"a": {"loss": None}}}


def test_names_become_what_mlflow_takes():
    assert _key("Klinik Süd (1)/loss") == "Klinik Süd _1_/loss"
    assert len(_key("x" * 300)) == 250


@pytest.mark.slow
def test_mlflow_keeps_each_round_once_in_the_run_folder_also_after_a_resume(tmp_path, home, capfd, monkeypatch):
    monkeypatch.setattr(process, "HURRY", process.DEADLINE)  # the library may take its time to start
    run = tmp_path / "run"
    log = run_folder(run)
    (run / "mlflow").mkdir()
    (run / "mlflow" / "mlflow.db").write_bytes(b"half of one")  # by a process that was killed while it made it
    for round in (1, 2, 3):
        log.append(record(round))
    assert follow("mlflow", run, "interrupted") is None
    log.truncate(2)  # as a resume does, whose checkpoint is of round 2
    for round in (3, 4):
        log.append(record(round))
    with contextlib.closing(sqlite3.connect(run / "mlflow" / "mlflow.db")) as store:
        ((first, status),) = store.execute("SELECT run_uuid, status FROM runs")
    assert status == "KILLED"
    assert follow("mlflow", run) is None
    (found,) = mlflow_runs(run)
    assert found["id"] == first
    assert (found["experiment"], found["name"], found["status"]) == ("a/b", "run", "FINISHED")
    assert found["tags"]["shoal.name"] == "a/b"
    assert found["params"]["identity.algorithm.name"] == "FedAvg"
    assert found["params"]["options.rounds"] == "3"
    assert len(found["params"]["identity.long"]) == 500
    history = found["history"]
    assert history["loss"] == [[round, round / 8] for round in (1, 2, 3, 4)]
    assert [step for step, _ in history["site-1/loss"]] == [1, 2, 3, 4]
    assert all(value != value for name in ("accuracy", "site-2/loss") for _, value in history[name])  # NaN
    assert not [*home.iterdir()]
    assert not processes_of(run)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_wandb_keeps_each_round_once_in_the_run_folder_also_after_a_resume(tmp_path, home, capfd, monkeypatch):
    monkeypatch.setattr(process, "HURRY", process.DEADLINE)  # the library may take its time to start
    monkeypatch.chdir(home)
    run = tmp_path / "run"
    log = run_folder(run)
    for round in (1, 2, 3):
        log.append(record(round))
    assert follow("wandb", run, "failed") is None
    log.truncate(2)
    for round in (3, 4):
        log.append(record(round))
    time.sleep(1.1)  # the library's folders are named by the second
    assert follow("wandb", run) is None
    found = wandb_records(run)
    runs = [told for what, told in found if what == "run"]
    assert len(runs) == 2
    assert runs[0] == runs[1] == [runs[0][0], "run", "a_b"]
    history = [told for what, told in found if what == "history"]
    assert [told["_step"] for told in history] == [1, 2, 3, 4]
    assert [told["loss"] for told in history] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert [told["site-1/loss"] for told in history] == [0.5] * 4
    assert {str(told["site-2/loss"]).lower() for told in history} == {"nan"}
    config = next(told for what, told in found if what == "config")
    assert config["options"] == {"rounds": 3}
    assert [told for what, told in found if what == "exit"] == [1, 0]
    assert not [*home.iterdir()]
    assert not processes_of(run)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_what_wandb_held_back_when_it_was_killed_is_written_anew(tmp_path, home):
    run = tmp_path / "run"
    log = run_folder(run)
    log.append(record(1))
    tracker = TrackerProcess("wandb", run)
    tracker.poke()
    until((run / "wandb" / "state.json").exists)
    (torn,) = run.glob("wandb/offline-run-*")
    (child,) = processes_of(run)
    os.kill(child, signal.SIGKILL)
    until(lambda: not processes_of(run))
    tracker.end("failed")
    tracker.close()
    assert "its process ended with exit code -9" in tracker.notice()
    log.append(record(2))
    time.sleep(1.1)
    assert follow("wandb", run) is None
    assert not torn.exists()
    assert [told["_step"] for what, told in wandb_records(run) if what == "history"] == [1, 2]


def test_a_tracker_gets_what_it_has_missed_and_each_record_once(tmp_path, fake):
    told = fake()
    log = run_folder(tmp_path / "run")
    log.append(record(1))
    tracker = TrackerProcess("wandb", tmp_path / "run")
    log.append(record(2))
    tracker.poke()
    until(lambda: told()[-1:] and told()[-1].get("step") == 2)
    log.append(record(3))
    tracker.poke()
    tracker.end("interrupted")
    tracker.close()
    tracker.close()
    assert tracker.notice() is None
    assert [line["step"] for line in told() if "step" in line] == [1, 2, 3]
    assert told()[-1] == {"exit": 1}


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_notice_and_gets_everything_when_it_works_again(tmp_path, fake, place):
    told = fake(**{place: "raise"})
    log = run_folder(tmp_path / "run")
    tracker = TrackerProcess("wandb", tmp_path / "run")
    notices: list[str | None] = []
    for round in (1, 2, 3):
        log.append(record(round))
        tracker.poke()
    if place != "finish":
        until(lambda: notices.append(tracker.notice()) or notices[-1])
    tracker.end("finished")
    tracker.close()
    (notice,) = [notice for notice in (*notices, tracker.notice()) if notice]
    assert notice.startswith("Weights & Biases: OSError: the network is down and so is everything (see ")
    assert [line["step"] for line in told() if "step" in line] == [1, 2, 3]
    assert "a banner" in (tmp_path / "run" / "wandb" / "output.log").read_text()


def test_a_tracker_that_hangs_is_given_less_time_by_a_run_that_did_not_finish(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(process, "HURRY", 0.2)
    monkeypatch.setattr(process, "KILL", 0.5)
    fake(log="hang")
    run_folder(tmp_path / "run").append(record(1))
    started = time.monotonic()
    assert "it had not taken everything 0.2 s after" in follow("wandb", tmp_path / "run", "interrupted")
    assert time.monotonic() - started < 5
    assert not processes_of(tmp_path / "run")


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_tracker_that_hangs_ends_at_the_deadline(tmp_path, fake, place):
    fake(**{place: "hang"})
    run_folder(tmp_path / "run").append(record(1))
    started = time.monotonic()
    notice = follow("wandb", tmp_path / "run", deadline=0.5)
    assert time.monotonic() - started < 5
    assert "it had not taken everything 0.5 s after the run's end" in notice
    assert not processes_of(tmp_path / "run")


def test_a_tracker_whose_process_dies_is_a_notice(tmp_path, fake):
    fake(log="exit")
    run_folder(tmp_path / "run").append(record(1))
    assert "its process ended with exit code 7" in follow("wandb", tmp_path / "run")


def test_when_the_run_is_killed_its_tracker_takes_the_rest_and_ends(tmp_path, fake):
    told = fake()
    run = tmp_path / "run"
    run_folder(run).append(record(1))
    script = "import os, pathlib, sys; from shoal.runs.trackers import TrackerProcess as T; "
    script += "T('wandb', pathlib.Path(sys.argv[1])).poke(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", script, str(run)], timeout=60)
    assert killed.returncode == -9
    until(lambda: told()[-1:] == [{"exit": 1}])
    until(lambda: not processes_of(run))
    assert [line["step"] for line in told() if "step" in line] == [1]


def test_a_trackers_process_is_quiet_and_at_home_in_the_run_unless_the_user_says_otherwise(home, monkeypatch):
    run = Path("/runs/one")
    assert process.variables("mlflow", run)["MLFLOW_DISABLE_TELEMETRY"] == "true"
    offline = process.variables("wandb", run)
    assert (offline["WANDB_MODE"], offline["WANDB_ERROR_REPORTING"]) == ("offline", "false")
    assert offline["WANDB_CACHE_DIR"] == "/runs/one/wandb/cache"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_SERVICE", "of the user's own run")
    online = process.variables("wandb", run)
    assert online["WANDB_MODE"] == "online"
    assert not {"WANDB_CACHE_DIR", "WANDB_SERVICE"} & online.keys()
