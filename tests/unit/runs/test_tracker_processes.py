"""Trackers that follow a run from processes of their own: with the real libraries offline, and with one that fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shoal
from shoal.data import Population
from shoal.errors import ConfigurationError, MissingExtraError
from shoal.runs import RunWriter
from shoal.runs.metrics import MetricsLog, scalars
from shoal.runs.trackers import TrackerProcess, process
from shoal.runs.trackers.mlflow import _key
from support import learner, population, samples

SITES = {"site-1": {"loss": 0.5}, "site-2": {"loss": float("nan")}}

FAKE = """
import json, os, time

def said(**what):
    with open(os.environ["FAKE_OUT"], "a") as stream:
        stream.write(json.dumps(what) + "\\n")

acts = json.loads(os.environ["FAKE_ACTS"])

def act(name):
    done = acts.get(name)
    if done == "raise":
        acts[name] = None
        print("a banner")
        raise OSError("the network is down\\nand so is everything")
    if done == "hang":
        time.sleep(600)
    if done == "exit":
        os._exit(7)

class Settings:
    def __init__(self, **settings):
        pass

class Config:
    def update(self, config, allow_val_change):
        said(config=sorted(config))

class Run:
    config = Config()
    dir = "/offline/files"

    def log(self, metrics, step, commit):
        act("log")
        said(step=step, names=sorted(metrics))

    def finish(self, exit_code):
        act("finish")
        said(exit=exit_code)

def init(**told):
    act("init")
    said(id=told["id"], name=told["name"], project=told["project"])
    return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a package in the place of ``wandb``, which does as it is told and writes down what it was given."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), *sys.path]))
    monkeypatch.setenv("FAKE_OUT", str(tmp_path / "told.jsonl"))
    monkeypatch.setenv("FAKE_ACTS", "{}")

    def told():
        path = tmp_path / "told.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def does(**acts):
        monkeypatch.setenv("FAKE_ACTS", json.dumps(acts))
        return told

    return does


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Is an empty home folder, without settings of trackers."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


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


def processes_of(run: Path) -> list[int]:
    """Returns the trackers' processes of a run."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _is_of(path, run)]


def _is_of(path: Path, run: Path) -> bool:
    try:
        line = path.read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return False
    return "shoal.runs.trackers" in line and str(run) in line


def wandb_records(run: Path) -> list[tuple[str, object]]:
    """Returns what lies in the offline folders of a run: the library's own messages, in a log of checksummed pieces."""
    script = """
import json, pathlib, sys
from wandb.proto.wandb_internal_pb2 import Record
for path in sorted(pathlib.Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    raw, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        message += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):
            continue
        record, message = Record.FromString(message), b""
        what = record.WhichOneof("record_type")
        if what == "history":
            told = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        elif what == "run":
            told = [record.run.run_id, record.run.display_name, record.run.project]
        elif what == "config":
            told = {item.key: json.loads(item.value_json) for item in record.config.update}
        elif what == "exit":
            told = record.exit.exit_code
        else:
            continue
        print(json.dumps([what, told]))
"""
    return [tuple(found) for found in asked(script, run)]


def mlflow_runs(run: Path) -> list[dict[str, object]]:
    """Returns the runs in a run's own store, as MLflow's client tells of them."""
    script = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{sys.argv[1]}/mlflow/mlflow.db")
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        history = {name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
                   for name in run.data.metrics}
        told = {"id": run.info.run_id, "experiment": experiment.name, "name": run.info.run_name,
                "status": run.info.status, "params": run.data.params, "tags": run.data.tags, "history": history}
        print(json.dumps(told))
"""
    return asked(script, run)


def asked(script: str, run: Path) -> list:
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(run)], capture_output=True, text=True, timeout=120, env=os.environ | quiet
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


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
def test_mlflow_keeps_each_round_once_in_the_run_folder_also_after_a_resume(tmp_path, home, capfd):
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
    (first,) = mlflow_runs(run)
    assert first["status"] == "KILLED"
    assert follow("mlflow", run) is None
    (found,) = mlflow_runs(run)
    assert found["id"] == first["id"]
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


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def named() -> Population:
    return Population.from_datasets([samples(9, seed=seed) for seed in (1, 2)], names=["site-1", "site-2"])


def test_named_clients_are_told_of_one_by_one_everywhere(tmp_path, fake):
    told = fake()
    settings = {"rounds": 2, "engine": "sequential", "run_dir": tmp_path / "run", "trackers": ["wandb", "wandb"]}
    result = shoal.federate(learner(), named(), **settings)
    sites = [record["sites"] for record in result.history]
    assert [sorted(each) for each in sites] == [["site-1", "site-2"]] * 2
    for record_, each in zip(result.history, sites, strict=True):
        assert sum(site["loss"] for site in each.values()) / 2 == pytest.approx(record_["train_loss"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["sites"] for line in lines] == sites
    given = [line["names"] for line in told() if "step" in line]
    assert len(given) == 2
    assert {"site-1/loss", "site-2/loss", "train_loss"} <= set(given[0])
    assert told()[-1] == {"exit": 0}
    assert "wandb" not in sys.modules
    assert b"site-2/loss" in next((tmp_path / "run" / "tensorboard").iterdir()).read_bytes()
    assert "Loss by site" in (tmp_path / "run" / "report.html").read_text()


def test_clients_without_names_are_not_told_of_one_by_one():
    result = shoal.federate(learner(), population(), rounds=1)
    assert "sites" not in result.history[0]


def test_engines_agree_on_the_sites():
    found = [shoal.federate(learner(), named(), rounds=2, engine=engine) for engine in ("sequential", "vectorized")]
    one, other = (result.history[-1]["sites"] for result in found)
    assert one.keys() == other.keys()
    for site in one:
        assert one[site] == pytest.approx(other[site], abs=1e-5)


def test_a_run_goes_on_where_nobody_answers(tmp_path, home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = shoal.federate(learner(), population(), rounds=3, trackers=["mlflow"], run_dir=tmp_path / "run")
    (notice,) = [notice for notice in result.notices if notice.startswith("MLflow: ")]
    assert "127.0.0.1" in notice
    assert len(result.history) == 3
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_training_is_followed_by_epochs_and_says_how_it_ended(tmp_path, fake):
    told = fake()
    settings = {"epochs": 2, "trackers": ("wandb",), "tensorboard": False}
    shoal.train(learner(), samples(12), run_dir=tmp_path / "run", **settings)
    assert [line["step"] for line in told() if "step" in line] == [1, 2]
    assert told()[-1] == {"exit": 0}


def test_an_interrupted_run_lets_its_tracker_take_the_rest_and_end(tmp_path, fake):
    told = fake()

    class Impatient(shoal.Callback):
        def on_round_end(self, record):
            if record["round"] == 2:
                raise KeyboardInterrupt

    settings = {"rounds": 3, "trackers": ["wandb"], "callbacks": [Impatient()], "run_dir": tmp_path / "run"}
    with pytest.raises(shoal.errors.RunInterrupted):
        shoal.federate(learner(), population(), **settings)
    assert [line["step"] for line in told() if "step" in line] == [1]
    assert told()[-1] == {"exit": 1}
    assert not processes_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "ending"), [(None, "finished"), (ValueError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_a_tracker_is_told_how_the_run_ended(error, ending):
    told = []

    class Stub:
        end, close, notice = told.append, (lambda: told.append("closed")), (lambda: None)

    with contextlib.suppress(*([error] if error else [])), RunWriter(None) as writer:
        writer._trackers = [Stub]
        if error:
            raise error
    assert told == [ending, "closed"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [("federate", "--rounds"), ("train", "--epochs")])
def test_the_command_line_names_trackers(tmp_path, fake, command):
    told = fake()
    words = [sys.executable, "-m", "shoal", command[0], "digits", command[1], "1", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*words, "--tracker", "wandb", "--set", "tensorboard=false"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
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


def entry_points():
    return [
        lambda **settings: shoal.federate(learner(), population(), rounds=1, **settings),
        lambda **settings: shoal.train(learner(), samples(9), epochs=1, **settings),
    ]


@pytest.mark.parametrize("run", entry_points())
@pytest.mark.parametrize(
    ("package", "name", "uri"),
    [("mlflow", "mlflow", ""), ("sqlalchemy", "mlflow", ""), ("wandb", "wandb", ""), ("mlflow", "mlflow", "http://a")],
)
def test_without_its_package_a_tracker_is_refused_with_the_command(tmp_path, monkeypatch, run, package, name, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"^{package} is needed .* pip install 'shoal\[{name}\]'"):
        run(trackers=[name], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("run", entry_points())
def test_what_is_no_tracker_or_has_no_folder_is_refused(run):
    with pytest.raises(ConfigurationError, match="unknown tracker 'comet'; known: mlflow, wandb"):
        run(trackers=["comet"])
    with pytest.raises(ConfigurationError, match=r"write trackers=\['mlflow'\]"):
        run(trackers="mlflow")
    with pytest.raises(ConfigurationError, match="name one with run_dir"):
        run(trackers=["mlflow"])
