"""A site's SuperNode: what starts it, and whose code it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

pytest.importorskip("flwr")

from shoal.cli.main import app
from shoal.deploy.flower_clientapp import REPLACED, replace
from shoal.deploy.flower_supernode import supernode_command, without_app_code
from shoal.errors import ConfigurationError, EngineError


def test_the_command_that_flower_starts_is_shoals_own(tmp_path):
    env = without_app_code(tmp_path / "a site", {"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(["flwr-clientapp", "--help"], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "--runtime-api-address" in done.stdout  # it takes what Flower's takes
    told = (tmp_path / "a site" / "flower-programs" / "flwr-clientapp").read_text()
    assert "-m shoal.flower " in told


def test_what_came_with_a_message_is_neither_installed_nor_loaded():
    loaded = []
    runtime = SimpleNamespace(
        install_from_fab=loaded.append,
        install_app_dependencies=loaded.append,
        get_load_client_app_fn=lambda **_: loaded.append,
    )
    replace(runtime, "own")
    runtime.install_from_fab(b"bytes", skip_prompt=True)
    assert runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)("id", "1", "hash") == "own"
    with pytest.raises(ConfigurationError, match="installs nothing"):
        runtime.install_app_dependencies("path")
    assert loaded == []


def test_flower_still_has_what_is_replaced():
    from flwr.supernode.runtime import run_clientapp

    assert all(callable(getattr(run_clientapp, name)) for name in REPLACED)
    with pytest.raises(EngineError, match="this version of Flower has no install_from_fab"):
        replace(SimpleNamespace(), None)


def test_a_path_that_flower_would_read_differently_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="without quotes"):
        supernode_command(tmp_path / "it's", [])


def test_the_command_takes_flowers_options_and_wants_a_sites_folder(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *words: started.append(words))
    words = ["supernode", str(tmp_path), "--superlink", "host:8000", "--insecure"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2
    assert "site.toml" in found.stderr
    (tmp_path / "site.toml").write_text('name = "site-1"\n[experiments.digits]\n')
    assert CliRunner().invoke(app, words).exit_code == 0
    [(program, command, env)] = started
    assert program.endswith("flower-supernode")
    assert command[1:] == ["--node-config", f"shoal-site='{tmp_path}'", "--superlink", "host:8000", "--insecure"]
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["PATH"].startswith(str(tmp_path / "flower-programs"))
