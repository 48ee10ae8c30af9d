from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from shoal.engines import large_pages
from shoal.engines.forking import fork


def in_a_child(body) -> str:
    """Returns what ``body`` returns in a forked process."""
    reading, writing = os.pipe()
    pid = fork(lambda: os.write(writing, str(body()).encode()))
    os.close(writing)
    with os.fdopen(reading) as file:
        told = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return told


def large() -> int:
    return int(re.search(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[1])


def test_what_is_in_memory_stays_as_it_is():
    array = np.random.default_rng(0).integers(256, size=2**24, dtype=np.uint8)  # 8 times 2 MiB
    before = array.copy()

    def body():
        large_pages.use_large_pages()
        return (array == before).all(), large() > 0

    same, _ = re.findall("True|False", in_a_child(body))
    assert same == "True"


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1) or not large_pages.SETTINGS.exists(),
    reason="Linux before 6.1, or without large pages, has none to give",
)
def test_memory_moves_into_large_pages_unless_the_user_has_turned_them_off(tmp_path, monkeypatch):
    array = np.ones(2**24, np.uint8)

    def body():
        before = large()
        large_pages.use_large_pages()
        return large() - before

    for setting, moved in (("always madvise [never]", False), ("always [madvise] never", True)):
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text((large_pages.SETTINGS / "hpage_pmd_size").read_text())
        with monkeypatch.context() as patch:
            patch.setattr(large_pages, "SETTINGS", tmp_path)
            assert (int(in_a_child(body)) > 2**13) == moved  # kB
    assert array.all()


def test_a_system_without_them_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(large_pages, "SETTINGS", tmp_path)
    large_pages.use_large_pages()
