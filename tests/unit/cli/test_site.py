from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from process_table import eventually
from shoal.cli.main import app
from shoal.deploy.answer import Answer
from shoal.deploy.bridge import ADDRESS, forward
from shoal.deploy.parcel import Parcel
from shoal.deploy.request import Request
from shoal.deploy.site_server import SiteServer

SETTINGS = 'name = "site-1"\n[experiments.digits]\n[experiments.mine]\nsource = "mine.py"\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "site.toml").write_text(SETTINGS)
    return tmp_path


@pytest.fixture(autouse=True)
def mask():
    """Takes back what the command sets for its whole process."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def shoal(*words):
    return CliRunner().invoke(app, ["site", *map(str, words)])


def test_check_says_what_is_allowed(folder):
    found = shoal(folder, "--check")
    assert found.exit_code == 0
    assert found.output == f"site-1 allows digits: digits\nsite-1 allows mine: {folder / 'mine.py'}\n"
    assert not (folder / ADDRESS).exists()


@pytest.mark.parametrize(
    ("text", "what"),
    [(None, "a site's folder has a file site.toml"), ("what", "is no TOML"), ('name = "a"', "allows no experiment")],
)
def test_a_folder_that_is_none_is_refused(tmp_path, text, what):
    if text is not None:
        (tmp_path / "site.toml").write_text(text)
    for words in ([tmp_path], [tmp_path, "--check"]):
        found = shoal(*words)
        assert found.exit_code == 2
        assert what in found.stderr
        assert found.stderr.count("\n") == 1


def test_what_it_writes_is_its_owners_alone(folder, monkeypatch):
    monkeypatch.setattr(SiteServer, "serve", lambda server: server._audit.write({"kind": "train"}))
    assert shoal(folder).exit_code == 0
    assert (folder / "audit.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_serves_until_it_is_ended(folder, number, code):
    def start():
        return subprocess.Popen(
            [sys.executable, "-m", "shoal", "site", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, process_group=0,
        )  # fmt: skip

    with start() as process:
        try:
            assert eventually((folder / ADDRESS).exists, 60)
            hello = Request(kind="hello", run="r1", experiment="digits").to_json()
            assert Answer.from_json(forward(Parcel(meta=hello), folder, within=20).meta).site == "site-1"
            with start() as second:
                out, err = second.communicate(timeout=60)
            assert (second.returncode, out) == (2, "")
            assert "another shoal site runs in" in err
            place = json.loads((folder / ADDRESS).read_text())["socket"]
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code
    assert out.splitlines()[0] == f"shoal: site-1 is ready in {folder}"
    assert err.strip() == "shoal: site-1 has ended"
    assert not (folder / ADDRESS).exists()
    assert not os.path.exists(place)  # noqa: PTH110
