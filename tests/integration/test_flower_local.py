"""Flower's own processes on this machine: with TLS and keys, over which parcels travel, and of which none is left."""

import contextlib
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.deploy.started import MARK, StartedProcesses
from shoal.errors import ConfigurationError, EngineError
from shoal.processes.table import marked

pytest.importorskip("flwr")

from shoal.deploy.flower_app import write_app
from shoal.deploy.flower_local import commands, down, up
from shoal.deploy.flower_submit import submit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.xdist_group("flower"),
    # What is started is to outlive whoever started it.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

ECHO = Path(__file__).parents[1] / "echo_site.py"

BROUGHT = 5_000_000
"""Bytes of a model that comes back."""

SERVER = """
import numpy as np
from flwr.serverapp import ServerApp

from shoal.deploy.flower_server import say
from shoal.deploy.flower_wire import FlowerWire
from shoal.deploy.parcel import Parcel, RawTensor, raw

app = ServerApp()


@app.main()
def main(grid, context):
    wire = FlowerWire(grid)
    tensors = {
        "large": raw(np.arange(2_000_000, dtype=np.float32)),
        "half": RawTensor("bfloat16", (2,), b"abcd"),
        "empty": RawTensor("float32", (0,), b""),
    }
    BODY
"""

ROUNDS = """
for number in range(2):
    tickets = wire.send(sorted(wire.present()), Parcel(meta={"number": number}, tensors=tensors))
    waiting = set(tickets.values())
    sites = []
    while waiting:
        for ticket, answer in wire.receive(2.0):
            waiting.discard(ticket)
            assert {name: bytes(t.data) for name, t in answer.tensors.items()} == {
                name: bytes(t.data) for name, t in tensors.items()
            }
            assert answer.meta["was"] == {"number": number}
            sites.append(answer.meta["site"])
    print("echo", number, sorted(sites), flush=True)
say("completed: well")
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("flower")
    sites = ["a", "b"]
    os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"  # is not to be called
    try:
        up(
            folder,
            sites,
            {name: [sys.executable, str(ECHO), str(folder / "sites" / name)] for name in sites},
            within=150,
        )
        yield folder
    finally:
        del os.environ["http_proxy"], os.environ["https_proxy"]
        down(folder)
    assert not marked(MARK, str(folder.resolve()))


def app(folder: Path, body: str) -> Path:
    write_app(folder, order="{}", name="echo", files={})
    (folder / "server_app.py").write_text(SERVER.replace("BODY", textwrap.indent(body.strip(), "    ").strip()))
    return folder


def test_parcels_travel_to_all_sites_and_back(deployment: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    submit(deployment, app(tmp_path / "app", ROUNDS), connection="shoal", show=lines.append, within=200)
    assert lines == ["echo 0 ['a', 'b']", "echo 1 ['a', 'b']", "shoal: run completed: well"]
    for kept in (deployment / "certificates" / "server.key", deployment / "keys" / "a"):
        assert kept.stat().st_mode & 0o777 == 0o600


def test_a_run_that_fails_is_an_error_with_its_own_words(deployment: Path, tmp_path: Path) -> None:
    body = 'from shoal.errors import EngineError\nsay("failed: no luck")\nraise EngineError("no luck")'
    lines: list[str] = []
    with pytest.raises(EngineError, match=r"did not complete \(finished:failed\): failed: no luck$"):
        submit(deployment, app(tmp_path / "app", body), connection="shoal", show=lines.append, within=200)
    assert lines == ["shoal: run failed: no luck"], "what Flower says of it need not be shown"


def test_a_runs_folder_comes_back(deployment: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    (there / "config.json").write_text("{}")
    (there / "model.safetensors").write_bytes(os.urandom(BROUGHT))
    body = f"""
from pathlib import Path
from shoal.deploy.flower_server import send_back
send_back(Path({str(there)!r}), context.run_config["nonce"])
say("completed: well")
"""
    lines: list[str] = []
    submit(deployment, app(tmp_path / "app", body), connection="shoal", show=lines.append, within=250, bring=here)
    assert lines[0] == "shoal: run completed: well"
    assert lines[1].startswith(f"the run is in {here}")
    assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()


def test_a_run_that_takes_too_long_is_stopped(deployment: Path, tmp_path: Path) -> None:
    body = "import time\ntime.sleep(600)"
    with pytest.raises(EngineError, match="was stopped"):
        submit(deployment, app(tmp_path / "app", body), connection="shoal", show=print, within=5)


def test_a_second_start_in_the_same_folder_is_refused(deployment: Path) -> None:
    with pytest.raises(ConfigurationError, match="a deployment runs in"):
        up(deployment, ["a"], {"a": ["true"]}, within=10)
    assert all(StartedProcesses(deployment).alive().values())
    assert any("shoal supernode" in line for line in commands(deployment))


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="site-a has ended"):
        up(tmp_path, ["a"], {"a": [sys.executable, "-c", "raise SystemExit('oh no')"]}, within=60)
    assert not marked(MARK, str(tmp_path.resolve()))
    with contextlib.suppress(FileNotFoundError):
        assert "oh no" in (tmp_path / "logs" / "site-a.log").read_text()


def test_a_superlink_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    home = tmp_path / "flower-home"
    home.mkdir()
    write_app(tmp_path / "app", order="{}", name="echo", files={})
    (home / "config.toml").write_text('[superlink]\n[superlink.shoal]\naddress = "127.0.0.1:1"\n')
    with pytest.raises(EngineError, match=r"no SuperLink answers at 127\.0\.0\.1:1"):
        submit(tmp_path, tmp_path / "app", connection="shoal", show=print)
    with pytest.raises(ConfigurationError, match="names no SuperLink 'other'"):
        submit(tmp_path, tmp_path / "app", connection="other", show=print)
