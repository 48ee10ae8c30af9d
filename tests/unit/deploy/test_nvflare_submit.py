from __future__ import annotations

import pytest

pytest.importorskip("nvflare")

from shoal.deploy.nvflare_submit import _unseen


@pytest.mark.parametrize(
    ("seen", "lines", "new"),
    [
        ("", "", ""),
        ("", "abc", "abc"),
        ("abc", "abc", ""),
        ("abc", "abcd", "d"),
        ("abc", "bcde", "de"),
        ("abc", "cd", "d"),
        ("abc", "de", "de"),
        ("aaa", "aaaa", "a"),
        ("abab", "ababab", "ab"),
        ("aab", "abc", "c"),
        ("abc", "", ""),
    ],
)
def test_what_is_new_in_the_end_of_a_log(seen, lines, new):
    assert _unseen(list(seen), list(lines)) == list(new)


def test_a_line_that_was_read_in_part_is_no_other():
    assert _unseen(["round 1", "round 2: lo"], ["round 1", "round 2: loss 3", "round 3"]) == ["round 3"]


def test_of_a_long_log_every_line_is_shown_once():
    log = [f"round {number}" for number in range(1000)]
    shown: list[str] = []
    seen: list[str] = []
    for end in range(0, 1001, 7):
        lines = log[max(0, end - 50) : end]
        shown += _unseen(seen, lines)
        seen = lines
    assert shown == log[: len(shown)]
    assert shown == log[:994]
