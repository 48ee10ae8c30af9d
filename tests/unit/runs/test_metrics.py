from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runs import MetricsLog, read_metrics

RECORDS = st.lists(
    st.dictionaries(st.text("ab", min_size=1), st.floats() | st.integers() | st.lists(st.integers())), max_size=6
)


def log(path, records):
    for number, record in enumerate(records, 1):
        MetricsLog(path).append({"round": number, **record})


@given(RECORDS)
def test_records_come_back_and_what_json_lacks_is_null(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    log(path, records)
    found = read_metrics(path)
    assert [record["round"] for record in found] == list(range(1, len(records) + 1))
    for record, sent in zip(found, records, strict=True):
        for key, value in sent.items():
            is_number = not isinstance(value, float) or abs(value) < float("inf")
            assert record[key] == (value if is_number else None)


@pytest.mark.parametrize("last", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_later_rounds_and_a_torn_line_are_removed(last, cut, tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, [{"x": 0.1}] * 3)
    path.write_bytes(path.read_bytes()[: -cut or None])
    whole = 3 if cut == 0 else 2
    assert len(read_metrics(path)) == whole
    MetricsLog(path).truncate(last)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == list(range(1, min(last, whole) + 1))
    assert path.read_bytes() == b"" or path.read_bytes().endswith(b"\n")


def test_a_whole_file_is_not_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, [{}])
    before = path.stat().st_ino
    MetricsLog(path).truncate(1)
    assert path.stat().st_ino == before


def test_no_file_is_no_record(tmp_path):
    MetricsLog(tmp_path / "none").truncate(3)
    assert read_metrics(tmp_path / "none") == []
