from __future__ import annotations

import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from process_table import open_files
from shoal.processes.messages import LIMIT, channel, receive, send

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)


@pytest.fixture
def ends():
    before = open_files()
    ours, theirs = channel()
    for end in (ours, theirs):
        end.settimeout(5)
    with ours, theirs:
        yield ours, theirs
    assert open_files() == before


@given(st.lists(st.dictionaries(st.text(max_size=10), values | st.lists(values, max_size=3)), max_size=5))
def test_messages_come_whole_and_in_order(messages):
    ours, theirs = channel()
    with ours, theirs:
        for message in messages:
            send(ours, message)
        assert [receive(theirs) for _ in messages] == [(message, None) for message in messages]


def test_a_file_goes_along_and_is_not_inherited_by_programs(ends):
    ours, theirs = ends
    reading, writing = os.pipe()
    send(ours, {"kind": "task"}, writing)
    os.close(writing)
    message, fd = receive(theirs)
    assert message == {"kind": "task"}
    assert not os.get_inheritable(fd)
    os.write(fd, b"through")
    os.close(fd)
    assert os.read(reading, 10) == b"through"
    os.close(reading)


def test_too_long_a_message_is_not_sent(ends):
    with pytest.raises(ValueError, match=f"is longer than {LIMIT}"):
        send(ends[0], {"text": "x" * LIMIT})
    send(ends[0], {"text": "x" * (LIMIT - 20)})
    assert receive(ends[1]) is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (json.dumps({"text": "x" * LIMIT}).encode(), "longer than"),
        (b"[1, 2]", r"must be a JSON object, not \[1, 2\]"),
        (b'{"kind": "ta', "Unterminated string"),
        (b"\xff\xfe\xfd", "codec can't decode"),
    ],
)
def test_what_is_no_message_is_refused_and_its_file_closed(data, message, ends):
    ours, theirs = ends
    socket.send_fds(ours, [data], [0])
    with pytest.raises(ValueError, match=message):
        receive(theirs)


def test_more_files_than_one_are_refused(ends):
    ours, theirs = ends
    socket.send_fds(ours, [b"{}"], [0, 1, 2])
    with pytest.raises(ValueError, match="longer than"):
        receive(theirs)


def test_a_closed_end_is_none_after_what_it_sent(ends):
    ours, theirs = ends
    send(ours, {"last": 1})
    ours.close()
    assert receive(theirs) == ({"last": 1}, None)
    assert receive(theirs) is None
    with pytest.raises(OSError):
        send(theirs, {})


def test_a_message_that_was_not_read_does_not_hide_those_that_were_sent(ends):
    ours, theirs = ends
    send(theirs, {"never": "read"})
    send(ours, {"last": 1})
    ours.close()
    assert receive(theirs) == ({"last": 1}, None)
    assert receive(theirs) is None


def test_waiting_has_an_end(ends):
    ends[0].settimeout(0.05)
    with pytest.raises(TimeoutError):
        receive(ends[0])
