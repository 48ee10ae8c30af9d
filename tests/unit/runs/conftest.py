"""A package in the place of a tracker's own, and a home folder without settings."""

from __future__ import annotations

import json
import os
import sys

import pytest

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
