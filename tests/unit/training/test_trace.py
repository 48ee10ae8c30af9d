from __future__ import annotations

import json
import re

import pytest

import shoal
from lightning_modules import Classifier
from shoal.errors import ConfigurationError, StorageError
from support import assert_equal, learner, samples


def recorded_steps(path):
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return sum(bool(re.fullmatch(r"Optimizer\.step#SGD\.step", str(event.get("name")))) for event in events)


def train(run_dir, *, count=80, **settings):
    devices = shoal.Devices(accelerator="cpu", threads=1)
    return shoal.train(
        learner(), samples(count), devices=devices, run_dir=run_dir, tensorboard=False, **{"epochs": 1, **settings}
    )


def test_five_steps_after_the_first_ones_are_recorded_and_the_numbers_stay_the_same(tmp_path):
    traced = train(tmp_path / "traced", trace=True)
    plain = train(tmp_path / "plain")
    assert [file.name for file in (tmp_path / "traced" / "trace").iterdir()] == ["rank-0.json"]
    assert recorded_steps(tmp_path / "traced" / "trace" / "rank-0.json") == 5
    assert not (tmp_path / "plain" / "trace").exists()
    assert_equal(traced.params, plain.params)


def test_a_short_training_is_recorded_to_the_end_of_its_epoch(tmp_path):
    train(tmp_path / "run", count=12, trace=True)  # three steps
    assert recorded_steps(tmp_path / "run" / "trace" / "rank-0.json") == 3
    train(tmp_path / "two", count=12, epochs=3, trace=True)  # of nine steps the last five, but the epoch ends after two
    assert recorded_steps(tmp_path / "two" / "trace" / "rank-0.json") == 2


def test_without_a_folder_there_is_nowhere_to_write():
    with pytest.raises(ConfigurationError, match="trace=True writes to the run folder: name one with run_dir=…"):
        train(None, trace=True)


def test_a_trace_that_cannot_be_written_ends_the_training_with_one_line(tmp_path, monkeypatch):
    from torch.profiler import profile

    def refuse(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile, "export_chrome_trace", refuse)
    with pytest.raises(StorageError, match=r"rank-0\.json could not be written: the disk is full"):
        train(tmp_path / "run", trace=True)
    assert list((tmp_path / "run" / "trace").iterdir()) == []


def test_lightning_takes_its_steps_itself(tmp_path):
    ours = shoal.LightningLearner(Classifier, trainer={"accelerator": "cpu"}, batch_size=4)
    with pytest.raises(ConfigurationError, match=r"which Lightning takes: use trainer=\{'profiler': 'pytorch'\}"):
        shoal.train(ours, samples(12), epochs=1, run_dir=tmp_path / "run", trace=True)
    assert not (tmp_path / "run").exists()
