"""A run's folder that comes back in the lines of a log."""

from pathlib import Path

import pytest

from shoal.deploy.flower_return import Parts, packed
from shoal.errors import EngineError, RunFolderError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "there" / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "checkpoints" / "large").write_bytes(b"x" * 1000)
    return folder


def test_a_folder_comes_back_as_it_was(run: Path, tmp_path: Path) -> None:
    parts = Parts("n1", tmp_path / "here")
    assert not parts.take("round 1/3")
    lines = list(packed(run, "n1"))
    assert max(map(len, lines)) < 10_000
    assert all(parts.take(line) for line in lines)
    assert str(run) in parts.finish()
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (run / path.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]


def test_lines_of_another_run_are_not_taken(run: Path, tmp_path: Path) -> None:
    parts = Parts("n1", tmp_path / "here")
    assert not any(parts.take(line) for line in packed(run, "n2"))
    with pytest.raises(EngineError, match="did not come back"):
        parts.finish()


@pytest.mark.parametrize("missing", [-1, 2])
def test_a_folder_that_did_not_come_whole_is_not_written(run: Path, tmp_path: Path, missing: int) -> None:
    parts = Parts("n1", tmp_path / "here")
    lines = list(packed(run, "n1"))
    del lines[missing]
    for line in lines:
        parts.take(line)
    with pytest.raises(EngineError, match="whole"):
        parts.finish()
    parts.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize("text", ["no json", '{"files": [{"name": "../out", "bytes": 1}]}', "[]"])
def test_what_no_run_sends_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(EngineError, match="damaged"):
        Parts("n1", tmp_path / "here").take(f"shoal-file n1 {text}")


def test_more_than_was_said_is_refused(run: Path, tmp_path: Path) -> None:
    parts = Parts("n1", tmp_path / "here")
    lines = list(packed(run, "n1"))
    for line in lines:
        parts.take(line)
    with pytest.raises(EngineError, match="more of it"):
        parts.take(lines[-1])


def test_a_large_folder_stays_where_it_is(run: Path, tmp_path: Path) -> None:
    parts = Parts("n1", tmp_path / "here")
    [line] = packed(run, "n1", largest=1000)
    assert parts.take(line)
    assert f"it stays in {run} on " in parts.finish()
    assert not (tmp_path / "here").exists()


def test_a_folder_with_something_in_it_is_left_alone(run: Path) -> None:
    with pytest.raises(RunFolderError, match="there already"):
        Parts("n1", run)
