from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from shoal.errors import RunFolderError
from shoal.runs import RunFolder, read_run

CONFIG = {
    "identity": {"seed": 1, "algorithm": {"name": "FedAvg", "server_lr": 1.0}, "pair": (1, 2)},
    "options": {"rounds": 3},
    "environment": {"versions": {"torch": "2.13.0"}, "command": ["shoal"]},
}


def changed(**identity):
    return CONFIG | {"identity": CONFIG["identity"] | identity}


def content(folder: Path):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_new_run_and_its_resume(tmp_path):
    path = tmp_path / "some" / "run"
    with RunFolder.open(path, CONFIG, resume=False) as folder:
        assert folder.notices == []
        assert folder.model.parent == path
    with RunFolder.open(path, CONFIG | {"options": {"rounds": 9}}, resume=True):
        pass
    found = read_run(path)
    assert found.config["options"] == {"rounds": 9}
    assert (found.name, found.metrics, found.partition) == ("run", [], None)


def test_an_empty_folder_will_do(tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=False).close()
    assert (tmp_path / "config.json").exists()


def test_a_process_killed_while_it_began_leaves_room_for_the_next(tmp_path):
    """What it leaves: its lock, and the configuration under its temporary name, whole or in part."""
    tmp_path.joinpath("run.lock").write_text("process 1 on host\n")
    tmp_path.joinpath(".config.json.tmp").write_text('{"identity": {"se')
    RunFolder.open(tmp_path, CONFIG, resume=False).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "run.lock"]


def test_other_versions_are_noticed(tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=False).close()
    newer = CONFIG | {"environment": {"versions": {"torch": "2.14.0"}, "command": ["other"]}}
    with RunFolder.open(tmp_path, newer, resume=True) as folder:
        assert folder.notices == ["versions.torch was 2.13.0 and is now 2.14.0"]


@pytest.mark.parametrize(
    ("config", "resume", "message"),
    [
        (CONFIG, False, r"holds this run already: add --resume"),
        (changed(seed=2), True, r"another configuration \(seed: 1 there, 2 here\)"),
        (changed(seed=2, algorithm={"name": "FedAvg", "server_lr": 0.5}, new=3), False,
         r"\(algorithm.server_lr: 1.0 there, 0.5 here; new: None there, 3 here; seed: 1 there, 2 here\)"),
        (changed(a=1, b=1, c=1, d=1), True, r"c: None there, 1 here and 1 more\)"),
    ],
)  # fmt: skip
def test_a_folder_of_a_run_is_refused_unchanged(config, resume, message, tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=False).close()
    lock = tmp_path / "run.lock"
    before = content(tmp_path) | {lock: None}
    with pytest.raises(RunFolderError, match=message):
        RunFolder.open(tmp_path, config, resume=resume)
    assert content(tmp_path) | {lock: None} == before


def test_what_is_no_run_is_refused_unchanged(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    before = content(tmp_path)
    for path, message in (
        (foreign, r"holds other things \(thesis.tex, …\) and no run"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(RunFolderError, match=message):
            RunFolder.open(path, CONFIG, resume=False)
    with pytest.raises(RunFolderError, match="there is no run to resume in"):
        RunFolder.open(tmp_path / "absent" / "run", CONFIG, resume=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\x00"])
def test_an_unreadable_configuration_is_said(text, tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=False).close()
    (tmp_path / "config.json").write_text(text)
    for call in (lambda: RunFolder.open(tmp_path, CONFIG, resume=True), lambda: read_run(tmp_path)):
        with pytest.raises(RunFolderError, match="config.json cannot be read"):
            call()


def hold(path, ready):
    with RunFolder.open(path, CONFIG, resume=False):
        ready.set()
        signal.pause()


def test_the_lock_names_its_holder_and_ends_with_it(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    child = context.Process(target=hold, args=(tmp_path, ready), daemon=True)
    child.start()
    try:
        assert ready.wait(60)
        with pytest.raises(RunFolderError, match=f"in use by process {child.pid} on "):
            RunFolder.open(tmp_path, CONFIG, resume=True)
        with pytest.raises(RunFolderError, match=f"in use by process {child.pid} on "):
            RunFolder.check(tmp_path, resume=True)
        assert read_run(tmp_path).config["options"] == {"rounds": 3}  # readers need no lock
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join(30)
    RunFolder.open(tmp_path, CONFIG, resume=True).close()


def test_a_look_before_changes_nothing(tmp_path):
    RunFolder.check(tmp_path / "new", resume=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunFolderError, match="there is no run to resume"):
        RunFolder.check(tmp_path / "new", resume=True)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="holds other things"):
        RunFolder.check(tmp_path, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_reading_what_is_no_run(tmp_path):
    for path, message in (
        (tmp_path, "is no run folder: it has no config.json"),
        (tmp_path / "x", "there is no run folder"),
    ):
        with pytest.raises(RunFolderError, match=message):
            read_run(path)
