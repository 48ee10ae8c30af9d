from __future__ import annotations

import sys

import pytest

from shoal.errors import MissingExtraError
from shoal.runs import TensorBoardTracker


def events(folder):
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        raw, place = path.read_bytes(), 0
        while place < len(raw):  # length, its checksum, the event, its checksum
            length = int.from_bytes(raw[place : place + 8], "little")
            found.append(Event.FromString(raw[place + 12 : place + 12 + length]))
            place += 16 + length
    return found


def test_scalars_are_events_and_a_resume_hides_what_it_runs_again(tmp_path):
    first = TensorBoardTracker(tmp_path)
    first.log(1, {"accuracy": 0.5, "loss": 1.0})
    first.close()
    again = TensorBoardTracker(tmp_path, first_round=2)
    again.log(2, {"accuracy": 0.75})
    again.close()
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert scalars == [(1, "accuracy", 0.5), (1, "loss", 1.0), (2, "accuracy", 0.75)]
    starts = [event.step for event in events(tmp_path) if event.session_log.status == 1]
    assert starts == [2]


def test_without_the_package_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'shoal\[tracking\]'"):
        TensorBoardTracker(tmp_path)
