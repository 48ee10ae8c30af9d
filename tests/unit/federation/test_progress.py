from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from torch.nn import functional as F

import shoal
from shoal.errors import ClientError
from support import learner, population, samples


def run(*, terminal, **settings):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120, legacy_windows=False)
    settings = {
        "rounds": 3,
        "evaluate": samples(20),
        "name": "a [name]",
        "callbacks": [shoal.Progress(console)],
        **settings,
    }
    result = shoal.federate(learner(), population(), **settings)
    return result, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())


def test_lines_for_a_file():
    result, shown = run(terminal=False)
    lines = shown.splitlines()
    assert lines[0] == "a [name]: 5 clients, 5 a round, 3 rounds"
    assert lines[1] == "engine vectorized: the clients' models can be stacked, and end as they would one by one"
    for number, record in enumerate(result.history, 1):
        told = f"accuracy {record['accuracy']:.4f} · loss {record['loss']:.4f}"
        assert lines[1 + number].startswith(f"round {number}/3 · {told} · ")
    assert any(line.startswith("best accuracy") and f"{result.best.value:.4f}" in line for line in lines)


def test_a_bar_for_a_person():
    result, shown = run(terminal=True)
    assert "3/3" in shown
    assert f"accuracy {result.history[-1]['accuracy']:.4f}" in shown
    assert "clients/s" in shown
    assert "left" in shown
    assert "\nround 1/3" not in shown


def test_slow_rounds_stay_above_the_bar_with_their_seconds(monkeypatch):
    monkeypatch.setattr("shoal.federation.progress.SLOW", 0.0)
    result, shown = run(terminal=True)
    for number, record in enumerate(result.history, 1):
        assert f"round {number}/3 · accuracy {record['accuracy']:.4f} · loss {record['loss']:.4f} · " in shown
    assert "clients/s" not in shown
    assert f" · {result.history[-1]['seconds']:.1f} s" in shown


def test_the_terminal_comes_back_after_an_error():
    def loss(output, target):
        if output.requires_grad:
            raise RuntimeError("[no] such thing")
        return F.cross_entropy(output, target)

    progress = shoal.Progress(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ClientError, match="no. such thing"):
        shoal.federate(learner(loss=loss), population(), rounds=2, callbacks=[progress])
    assert not progress._bars.live.is_started
