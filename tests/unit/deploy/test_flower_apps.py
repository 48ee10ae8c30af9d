"""The apps of Flower's that shoal writes, and what they do, without Flower's processes."""

import json
import os
import signal
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.deploy.flower_app import app_name, write_app
from shoal.deploy.flower_server import serve
from shoal.deploy.parcel import Parcel, RawTensor
from shoal.errors import ConfigurationError, EngineError

pytest.importorskip("flwr")

from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of a package of flwr's

ORDER = json.dumps({"experiment": "job.py", "text": 'é😀\n"q" \x7f \\'}, ensure_ascii=False)


def written(tmp_path: Path, **files: Path) -> Path:
    write_app(tmp_path / "app", order=ORDER, name="digits", files=files)
    return tmp_path / "app"


def job(tmp_path: Path, name: str = "job.py") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x = 1\n")
    return path


def test_flower_takes_the_app_as_it_is_written(tmp_path: Path) -> None:
    app = tmp_path / "app"
    write_app(app, order=ORDER, name="digits", files={"job.py": job(tmp_path), "own/more.py": job(tmp_path)})
    config, warnings = load_and_validate(app / "pyproject.toml")
    assert warnings == []
    assert config["tool"]["flwr"]["app"]["config"]["order"] == ORDER
    fab = build_fab_from_disk(app)
    for carried in ("client_app.py", "server_app.py", "experiment/job.py", "experiment/own/more.py"):
        assert carried.encode() in fab


def test_a_folder_is_carried_with_all_that_is_in_it(tmp_path: Path) -> None:
    job(tmp_path, "parts/a.py")
    job(tmp_path, "parts/deep/b.json")
    job(tmp_path, "parts/__pycache__/a.pyc")
    app = tmp_path / "app"
    write_app(app, order=ORDER, name="digits", files={"parts": tmp_path / "parts"})
    found = [str(path.relative_to(app / "experiment")) for path in (app / "experiment").rglob("*") if path.is_file()]
    assert sorted(found) == ["parts/a.py", "parts/deep/b.json"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", r"model\.safetensors: only files that end in"),
        ("test_job.py", "name it differently"),
        ("pyproject.toml", "name it differently"),
        ("a/b/c/d/e/f/g/h/i.py", "deeper than"),
        ("../out.py", "leads out"),
    ],
)
def test_what_flower_would_leave_out_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        write_app(tmp_path / "app", order=ORDER, name="digits", files={name: job(tmp_path)})
    assert not (tmp_path / "app").exists()


def test_what_is_too_large_for_flower_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(b" " * 9_000_000)
    with pytest.raises(ConfigurationError, match=r"9\.0 MB.*put the folder on the machine of the SuperLink"):
        write_app(tmp_path / "app", order=ORDER, name="digits", files={"data.json": tmp_path / "data.json"})


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    app = written(tmp_path)
    with pytest.raises(ConfigurationError, match="there already"):
        written(tmp_path)
    assert tomllib.loads((app / "pyproject.toml").read_text())["project"]["name"] == "digits"


def test_names_become_such_as_flower_allows() -> None:
    assert app_name("my digits_run!") == "my-digits-run"
    assert len(app_name("a" * 80)) == 32
    with pytest.raises(ConfigurationError):
        app_name("123")


@dataclass(frozen=True)
class Order:
    experiment: str
    run_dir: str = "/runs/one"


def run(config: dict[str, Any], folder: Path, body: Any = lambda order: None) -> None:
    serve(config, folder, Order, body)


def test_a_carried_experiment_is_found_in_the_app(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carried = job(tmp_path, "experiment/job.py")
    seen: list[str] = []
    for named in ("job.py", "digits", "/srv/jobs/one"):
        run({"order": named}, tmp_path, lambda order: seen.append(order.experiment))
    assert seen == [str(carried.resolve()), "digits", "/srv/jobs/one"]
    assert capsys.readouterr().out.splitlines()[-1] == "shoal: run completed: /runs/one"


def test_a_run_that_fails_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(order: Order) -> None:
        raise EngineError("two\nlines")

    with pytest.raises(EngineError):
        run({"order": "x"}, tmp_path, fail)
    assert capsys.readouterr().out == "shoal: run failed: two lines\n"
    with pytest.raises(ConfigurationError, match="shoal export"):
        run({}, tmp_path)


def test_flowers_signal_ends_a_run_as_ctrl_c_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Flower has its own there

    def stop(order: Order) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    try:
        with pytest.raises(EngineError, match="was stopped"):
            run({"order": "x"}, tmp_path, stop)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.startswith("shoal: run stopped:")


def message(parcel: Parcel, ttl: float = 100.0) -> Any:
    from flwr.app import Message, Metadata
    from flwr.app.message import make_message

    from shoal.deploy.flower_records import records_of

    told = Metadata(
        run_id=1,
        message_id="m",
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=ttl,
        message_type="train",
    )
    made: Message = make_message(metadata=told, content=records_of(parcel))
    return made


def test_the_client_brings_a_message_to_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shoal.flower
    from shoal.deploy.flower_records import parcel_of

    called: list[tuple[Path, float]] = []

    def forward(parcel: Parcel, folder: Path, *, within: float) -> Parcel:
        called.append((folder, within))
        return Parcel(meta={"was": dict(parcel.meta)}, tensors=parcel.tensors)

    monkeypatch.setattr(shoal.flower, "forward", forward)
    context = SimpleNamespace(node_config={"shoal-site": str(tmp_path)})
    sent = Parcel(meta={"n": 1}, tensors={"w": RawTensor("bfloat16", (1,), b"ab")})
    reply = shoal.flower.client_app(message(sent), context)
    answer = parcel_of(reply.content)
    assert answer.meta == {"was": {"n": 1}}
    assert bytes(answer.tensors["w"].data) == b"ab"
    shoal.flower.client_app(message(Parcel(meta={"seconds": 5})), context)
    (folder, within), (_, asked) = called
    assert folder == tmp_path
    assert 80 < within < 100, "it waits for the site as long as Flower takes a reply"
    assert asked == 65, "and no longer than the server does, and a little"


def test_what_goes_wrong_at_the_site_is_the_reply(tmp_path: Path) -> None:
    import shoal.flower
    from shoal.deploy.flower_records import parcel_of

    def error_of(config: dict[str, str]) -> str:
        reply = shoal.flower.client_app(message(Parcel(meta={})), SimpleNamespace(node_config=config))
        return str(parcel_of(reply.content).meta["error"])

    assert "shoal supernode" in error_of({})
    assert f"shoal site {tmp_path}" in error_of({"shoal-site": str(tmp_path)})


def test_the_client_imports_no_framework() -> None:
    import subprocess
    import sys

    code = "import shoal.flower, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    imported = set(done.stdout.split())
    assert "shoal.flower" in imported, done.stderr
    assert not imported & {"torch", "tensorflow", "ray", "shoal.engines", "shoal.experiments"}
