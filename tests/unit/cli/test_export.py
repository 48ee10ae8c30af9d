"""``shoal export`` and ``shoal submit``: what is written, and what is refused before anything is sent."""

from __future__ import annotations

import json
import tomllib

import pytest
from typer.testing import CliRunner

from shoal.cli.main import app
from shoal.deploy.order import Order

EXPERIMENT = """
from pathlib import Path

import numpy as np

import shoal

def experiment(*, rounds: int = 3):
    script = Path(__file__).with_name("train.py")
    return shoal.Job("mine", script=script, model={"w": np.zeros(3)}, sites=[shoal.Site("a")], rounds=rounds)
"""


def shoal(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def order_in(folder, to):
    if to == "flower":
        told = tomllib.loads((folder / "pyproject.toml").read_text())
        return Order.from_json(told["tool"]["flwr"]["app"]["config"]["order"])
    return Order.from_json((folder / "app" / "config" / "shoal_order.json").read_text())


@pytest.fixture
def source(tmp_path):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    (tmp_path / "train.py").write_text("")
    return tmp_path / "mine.py"


@pytest.mark.parametrize("to", ["flower", "nvflare"])
def test_an_export_says_what_the_server_is_to_run(source, tmp_path, to):
    found = shoal("export", source, tmp_path / "out", "--to", to, "--set", "rounds=7", "--name", "study")
    assert found.exit_code == 0, found.stderr
    assert f"shoal submit {tmp_path / 'out'}" in found.stdout
    order = order_in(tmp_path / "out", to)
    assert order == Order(experiment="mine.py", name="study", settings={"rounds": "7"})
    carried = {path.name for path in (tmp_path / "out").rglob("*.py")}
    assert "mine.py" in carried


@pytest.mark.parametrize("to", ["flower", "nvflare"])
def test_an_export_may_go_on_with_a_run_and_leave_the_files_where_they_are(source, tmp_path, to):
    more = ["--at", "/srv/mine.py", "--run-dir", "/srv/run", "--resume"]
    assert shoal("export", source, tmp_path / "out", "--to", to, *more).exit_code == 0
    order = order_in(tmp_path / "out", to)
    assert order == Order(experiment="/srv/mine.py", name="mine", run_dir="/srv/run", resume=True)
    assert "mine.py" not in {path.name for path in (tmp_path / "out").rglob("*.py")}


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--to", "flwr"], "flwr"),
        (["--to", "flower", "--set", "round=7"], "round"),
        (["--to", "flower", "--resume"], "name it with --run-dir"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_nothing_written(source, tmp_path, more, what):
    found = shoal("export", source, tmp_path / "out", *more)
    assert found.exit_code == 2
    assert what in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, "", "[tool.flwr]\n", "[tool"])
def test_a_folder_that_was_not_exported_is_not_submitted(tmp_path, text):
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    found = shoal("submit", tmp_path, "prod")
    assert found.exit_code == 2
    assert "write one with `shoal export`" in found.stderr


def test_an_app_is_not_submitted_for_a_folder_that_is_taken(source, tmp_path):
    pytest.importorskip("flwr")
    assert shoal("export", source, tmp_path / "out", "--to", "flower").exit_code == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({}))
    found = shoal("submit", tmp_path / "out", "prod", "--run-dir", tmp_path / "run")
    assert found.exit_code == 2
    assert str(tmp_path / "run") in found.stderr


def test_a_server_that_nobody_names_is_told(source, tmp_path, monkeypatch):
    pytest.importorskip("flwr")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text('[superlink.local]\naddress = "127.0.0.1:1"\n')
    assert shoal("export", source, tmp_path / "out", "--to", "flower").exit_code == 0
    found = shoal("submit", tmp_path / "out", "prod", "--run-dir", tmp_path / "run")
    assert found.exit_code == 2
    assert "names no SuperLink 'prod'" in found.stderr
    assert "local" in found.stderr
    assert not (tmp_path / "run").exists()


def test_a_startup_kit_that_is_none_is_told(source, tmp_path):
    pytest.importorskip("nvflare")
    assert shoal("export", source, tmp_path / "out", "--to", "nvflare").exit_code == 0
    found = shoal("submit", tmp_path / "out", tmp_path, "--run-dir", tmp_path / "run")
    assert found.exit_code == 2
    assert "startup kit" in found.stderr
    assert not (tmp_path / "run").exists()
