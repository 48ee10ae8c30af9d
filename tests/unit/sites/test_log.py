from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from process_table import eventually, open_files
from shoal.errors import StorageError
from shoal.sites.log import LINES, UNKEPT, SiteLog


@pytest.fixture
def pipe():
    """A log's stream, and a file to write to it."""
    before = open_files()
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as file:
        yield stream, file
    assert open_files() == before


def read(pipe, data, *, all_shown=False, name="site-1"):
    """Returns a log that has read this, and what it has shown."""
    shown = []
    log = SiteLog(name, all_shown=all_shown, show=shown.append)
    stream, file = pipe
    log.follow(stream)
    file.write(data)
    file.close()
    log.close(10)
    assert log.ended
    return log, shown


SAID = b"rank 0: one\nrank 1: two\nthe launcher\nrank 10: ten\nrank 1: three: four\n"


def test_rank_0_is_shown_and_all_is_remembered(pipe):
    log, shown = read(pipe, SAID)
    assert shown == ["site-1: one"]
    assert log.last(1) == ("two", "three: four")
    assert log.last(10) == ("ten",)
    assert log.last(None) == ("the launcher",)
    assert log.last(2) == ()


def test_all_ranks_are_shown_on_request(pipe):
    _, shown = read(pipe, SAID, all_shown=True)
    assert shown == [
        "site-1: one",
        "site-1 rank 1: two",
        "site-1: the launcher",
        "site-1 rank 10: ten",
        "site-1 rank 1: three: four",
    ]


def test_the_last_lines_are_kept(pipe):
    log, _ = read(pipe, b"".join(b"rank 3: %d\n" % number for number in range(100)))
    assert log.last(3) == tuple(str(number) for number in range(100 - LINES, 100))


def test_what_is_no_text_and_has_no_end_is_taken_too(pipe):
    log, shown = read(pipe, b"rank 0: \xff\xfe\r\nrank 0:\nrank 0: the end")
    assert shown == ["site-1: \ufffd\ufffd", "site-1: the end"]
    assert log.last(0) == ("\ufffd\ufffd", "the end")


def test_the_file_has_everything_in_order(pipe, tmp_path):
    log = SiteLog("site-1", all_shown=False, show=lambda line: None)
    stream, file = pipe
    log.follow(stream)
    file.write(b"rank 0: before\n")
    assert eventually(lambda: log.last(0))
    assert log.path is None
    log.keep(tmp_path / "sites" / "site-1.log")
    file.write(b"rank 1: after\n")
    assert eventually(lambda: log.last(1))
    assert log.path.read_bytes() == b"rank 0: before\nrank 1: after\n"  # at once
    file.close()
    log.close(10)
    assert log.ended


def test_a_resumed_run_goes_on_with_its_file(pipe, tmp_path):
    path = tmp_path / "site-1.log"
    path.write_bytes(b"earlier\n")
    log, _ = read(pipe, b"rank 0: later\n")
    log.keep(path)
    log.close(10)
    assert path.read_bytes() == b"earlier\nrank 0: later\n"


def test_no_more_lines_wait_for_a_file_than_memory_should_hold(pipe, tmp_path):
    log, _ = read(pipe, b"rank 1: x\n" * (UNKEPT + 10))
    log.keep(tmp_path / "log")
    log.close(10)
    assert (tmp_path / "log").read_bytes().count(b"\n") == UNKEPT


def test_a_file_that_cannot_be_is_told(pipe, tmp_path):
    (tmp_path / "sites").write_text("in the way")
    log, _ = read(pipe, b"rank 0: one\n")
    with pytest.raises(StorageError):
        log.keep(tmp_path / "sites" / "site-1.log")
    log.close(10)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("closed")])
def test_what_cannot_be_shown_is_kept_all_the_same(pipe, tmp_path, error):
    def refuse(line):
        raise error

    log = SiteLog("site-1", all_shown=True, show=refuse)
    stream, file = pipe
    log.keep(tmp_path / "log")
    log.follow(stream)
    for line in (b"rank 0: one\n", b"rank 1: two\n"):
        file.write(line)
        assert eventually(lambda line=line: (tmp_path / "log").read_bytes().endswith(line))
    file.close()
    log.close(10)
    assert (log.last(0), log.last(1)) == (("one",), ("two",))


def test_lines_that_find_the_disk_full_are_remembered(pipe):
    log = SiteLog("site-1", all_shown=False, show=lambda line: None)
    stream, file = pipe
    log.keep(Path("/dev/full"))
    log.follow(stream)
    file.write(b"rank 0: one\nrank 0: two\n")
    file.close()
    log.close(10)
    assert log.last(0) == ("one", "two")


def test_a_disk_that_is_full_already_is_told(pipe):
    log, _ = read(pipe, b"rank 0: one\n")
    with pytest.raises(StorageError, match="^/dev/full could not be written: the disk is full"):
        log.keep(Path("/dev/full"))
    log.close(10)
