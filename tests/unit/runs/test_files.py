from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from torch import nn

import shoal
from shoal.errors import StorageError
from shoal.runs import Checkpoints, MetricsLog, save_model, write_json
from shoal.runs.files import require_space, write_atomic
from support import CLASSES, FEATURES, learner, population


def refusing(code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, r"the disk is full \(No space left on device\)"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "Read-only file system"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_atomic(folder / "file", "new"),
        lambda folder: write_json(folder / "file", {"new": 1}),
        lambda folder: save_model(folder / "file", {"x": np.ones(2)}, {}),
        lambda folder: MetricsLog(folder / "file").append({"round": 2}),
        lambda folder: Checkpoints(folder, keep=2).save(1, {"x": np.ones(2)}, {}, best=None),
    ],
)
def test_a_refused_write_is_one_line_and_leaves_what_was_there(write, code, reason, tmp_path, monkeypatch):
    (tmp_path / "file").write_text('{"round": 1}\n')
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refusing(code))
        with pytest.raises(StorageError, match=reason) as caught:
            write(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == '{"round": 1}\n'


def test_too_little_room_is_seen_before_anything_is_written(tmp_path):
    with pytest.raises(StorageError, match="needs 1000000000.0 GB for its checkpoints, and its disk has"):
        require_space(tmp_path / "not" / "there", 10**18)
    require_space(tmp_path / "not" / "there", 1)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, timeout=30
    )
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


EXPERIMENT = """
from support import learner, population
import shoal

def experiment():
    return shoal.Experiment(learner=learner(), clients=population(), rounds=1, keep_checkpoints=1, tensorboard=False)
"""


def run(disk, rounds, *options):
    (disk.parent / "mine.py").write_text(EXPERIMENT)
    words = [sys.executable, "-m", "shoal", "federate", disk.parent / "mine.py", "--run-dir", disk / "run"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [*map(str, words), "--rounds", str(rounds), *options]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


def test_a_disk_that_fills_up_stops_the_run_and_room_lets_it_go_on(tmp_path):
    with small_disk(tmp_path / "disk", "200k") as disk:
        first = run(disk, 3)
        assert first.returncode == 0, first.stderr
        assert "no report: " in first.stdout  # it would not fit; the model is there all the same
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        with (disk / "ballast").open("r+b") as stream:
            stream.truncate((disk / "ballast").stat().st_size - 20 * 4096)  # for a few more rounds, not for many
        full = run(disk, 500, "--resume")
        assert full.returncode == 1
        assert full.stderr.count("\n") == 1, full.stderr
        assert "could not be written: the disk is full" in full.stderr
        kept = sorted(path.name for path in (disk / "run/checkpoints").iterdir() if not path.is_symlink())
        assert all(name.startswith("round-") for name in kept), kept
        done = int(kept[-1].removeprefix("round-"))
        assert done >= 3
        (disk / "ballast").unlink()
        again = run(disk, done + 2, "--resume")
        assert again.returncode == 0, again.stderr
        assert (disk / "run/metrics.jsonl").read_text().count("\n") == done + 2


def wide():
    return nn.Sequential(nn.Linear(FEATURES, 2000), nn.Linear(2000, CLASSES))


def test_a_run_that_cannot_fit_is_refused(tmp_path):
    with small_disk(tmp_path / "disk", "16k") as disk:
        with pytest.raises(StorageError, match="for its checkpoints, and its disk has 0.0 MB free"):
            shoal.federate(learner(wide), population(), rounds=2, run_dir=disk / "run")
        assert list(disk.iterdir()) == []
