from __future__ import annotations

import json
import multiprocessing
import random
import time

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from shoal.errors import CheckpointError, ConfigurationError, StorageError
from shoal.runs import Checkpoints, save_model
from shoal.runs.checkpoints import _as_os_error, save_tensors
from shoal.runs.files import storing
from support import assert_equal

SHARED = torch.arange(12.0).reshape(3, 4)
TREES = {
    "torch": {
        "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "half": torch.ones(2, 2, dtype=torch.float16),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "transposed": SHARED.t(),
        "shared": SHARED[1:],
    },
    "numpy": {
        "double": np.array(0.1),
        "single": np.ones((2, 3), np.float32),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "count": np.array([1, 2]),
        "empty": np.zeros((0, 2)),
    },
}


@pytest.mark.parametrize("kind", TREES)
def test_arrays_of_every_kind_come_back(kind, tmp_path):
    tree = TREES[kind]
    Checkpoints(tmp_path / "new", keep=1).save(3, tree, {"elapsed": 0.5}, best=None)
    found = Checkpoints(tmp_path / "new", keep=1).load_latest()
    assert (found.number, found.meta, found.notices) == (3, {"elapsed": 0.5}, [])
    assert_equal(found.tensors, tree)
    assert {name: array.dtype for name, array in found.tensors.items()} == {n: a.dtype for n, a in tree.items()}
    files = [path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert not any(raw.startswith(b"\x80") or b"PK\x03\x04" in raw for raw in files)  # neither a pickle nor torch.save


def saved(folder, rounds, *, keep=3, bests=None):
    checkpoints = Checkpoints(folder, keep=keep)
    for number in rounds:
        best = (bests or {}).get(number)
        checkpoints.save(number, {"x": np.full(50, float(number))}, {"number": number}, best=best)
    return checkpoints


def test_the_latest_and_the_best_are_kept(tmp_path):
    assert saved(tmp_path / "a", range(1, 9)).numbers() == [6, 7, 8]
    assert saved(tmp_path / "b", range(1, 9), keep=1, bests=dict.fromkeys(range(1, 9), 2)).numbers() == [2, 8]


def test_the_best_that_an_older_one_would_need_is_kept_too(tmp_path):
    bests = dict.fromkeys(range(2, 8), 2) | {8: 8}
    checkpoints = saved(tmp_path, range(1, 9), bests=bests)
    assert checkpoints.numbers() == [2, 6, 7, 8]
    (tmp_path / "round-000008" / "state.json").unlink()
    assert checkpoints.load_latest().number == 7
    assert checkpoints.load(2).meta == {"number": 2}


def test_latest_and_best_lead_to_checkpoints(tmp_path):
    saved(tmp_path, range(1, 9), bests=dict.fromkeys(range(3, 9), 3))
    assert (tmp_path / "latest").resolve() == tmp_path / "round-000008"
    assert (tmp_path / "best" / "state.json").is_file()
    assert (tmp_path / "best").resolve() == tmp_path / "round-000003"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def edit(**fields):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = [
    ("state.safetensors", truncate),
    ("state.safetensors", flip),
    ("state.safetensors", lambda path: path.unlink()),
    ("state.safetensors", lambda path: path.write_bytes(b"")),
    ("state.json", lambda path: path.unlink()),
    ("state.json", truncate),
    ("state.json", lambda path: path.write_text("[]")),
    ("state.json", lambda path: path.write_text("{}")),
    ("state.json", edit(format=99)),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_notice(name, damage, tmp_path):
    checkpoints = saved(tmp_path, [1, 2, 3])
    damage(tmp_path / "round-000003" / name)
    found = checkpoints.load_latest()
    assert found.number == 2
    assert len(found.notices) == 1
    assert found.notices[0].startswith("checkpoint round-000003 is damaged (")
    assert found.notices[0].endswith("; going on from round-000002")
    checkpoints.discard_after(2)
    assert checkpoints.numbers() == [1, 2]
    checkpoints.save(3, {"x": np.zeros(1)}, {}, best=None)
    assert checkpoints.load_latest().number == 3


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    checkpoints = saved(tmp_path / "a", [1, 2])
    for number in (1, 2):
        truncate(tmp_path / f"a/round-00000{number}/state.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read: checkpoint round-000002 is damaged"):
        checkpoints.load_latest()
    assert Checkpoints(tmp_path / "b", keep=2).load_latest() is None


def test_what_a_crash_left_unfinished_is_removed(tmp_path):
    checkpoints = saved(tmp_path, [1])
    leftover = tmp_path / ".writing-round-000002"
    leftover.mkdir()
    (leftover / "state.safetensors").write_bytes(b"half")
    assert checkpoints.load_latest().number == 1
    checkpoints.discard_after(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "round-000001"]
    checkpoints.discard_after(0)
    assert list(tmp_path.iterdir()) == []


def save_for_ever(folder, first):
    checkpoints = Checkpoints(folder, keep=2)
    number = first
    while True:
        number += 1
        checkpoints.save(
            number, {"x": torch.full((2000,), float(number))}, {"number": number}, best=number - number % 5
        )


def newest(folder):
    return max(int(path.name.removeprefix("round-")) for path in folder.glob("round-*"))


def test_a_kill_at_any_moment_leaves_a_whole_latest_checkpoint_and_its_best(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "shoal.runs"])
    chance = random.Random(4)
    saved(tmp_path, [5], keep=2, bests={5: 5})
    latest, ends = 5, set()
    for _ in range(25):
        child = context.Process(target=save_for_ever, args=(tmp_path, latest), daemon=True)
        child.start()
        deadline = time.monotonic() + 30
        while newest(tmp_path) <= latest and time.monotonic() < deadline:
            child.join(0.005)  # a loaded machine starts it late
        child.join(chance.uniform(0, 0.1))
        child.kill()
        child.join(10)
        checkpoints = Checkpoints(tmp_path, keep=2)
        found = checkpoints.load_latest()
        assert found.notices == []
        assert found.number >= latest
        assert found.tensors["x"][0] == found.number or found.number == 5
        best = found.number - found.number % 5
        assert checkpoints.load(best).number == best
        ends.add(found.number)
        checkpoints.discard_after(found.number)
        latest = found.number
    assert len(ends) > 5


def test_a_model_loads_into_a_module_and_is_readable_by_others(tmp_path):
    path = tmp_path / "model.safetensors"
    module = torch.nn.Linear(2, 3)
    save_model(path, module.state_dict(), {"shoal": "{}"})
    from safetensors.torch import load_file

    torch.nn.Linear(2, 3).load_state_dict(load_file(path), strict=True)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    save_tensors(tmp_path / "again", module.state_dict())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_disk_that_fills_while_tensors_are_written_is_called_full(tmp_path):
    with pytest.raises(StorageError, match="the disk is full"), storing(tmp_path), _as_os_error():
        raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be saved as safetensors"):
        save_model(tmp_path / "model.safetensors", {"x": np.ones(2, dtype=np.clongdouble)}, {})
