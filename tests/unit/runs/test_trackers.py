from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboardX.record_writer import RecordWriter

from shoal.errors import MissingExtraError, StorageError
from shoal.runs import TensorBoardTracker
from tracked import tensorboard_events


def test_scalars_are_events_and_a_resume_hides_what_it_runs_again(tmp_path):
    first = TensorBoardTracker(tmp_path)
    first.log(1, {"accuracy": 0.5, "loss": 1.0})
    first.close()
    again = TensorBoardTracker(tmp_path, first_round=2)
    again.log(2, {"accuracy": 0.75})
    again.close()
    scalars = [(e.step, v.tag, v.simple_value) for e in tensorboard_events(tmp_path) for v in e.summary.value]
    assert scalars == [(1, "accuracy", 0.5), (1, "loss", 1.0), (2, "accuracy", 0.75)]
    starts = [event.step for event in tensorboard_events(tmp_path) if event.session_log.status == 1]
    assert starts == [2]


def test_without_the_package_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'shoal\[tracking\]'"):
        TensorBoardTracker(tmp_path)


def test_a_full_disk_is_one_line_and_closing_stays_silent():
    tracker = TensorBoardTracker.__new__(TensorBoardTracker)
    tracker._path = Path("/dev/full")
    tracker._writer = RecordWriter("/dev/full")
    with pytest.raises(StorageError, match=r"^/dev/full could not be written: the disk is full"):
        tracker.log(1, {"loss": 1.0})
    tracker.close()
