"""Federations and trainings that trackers follow."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest

import shoal
from shoal.data import Population
from shoal.errors import ConfigurationError, MissingExtraError
from shoal.runs import RunWriter
from support import learner, population, samples
from tracked import processes_of


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
