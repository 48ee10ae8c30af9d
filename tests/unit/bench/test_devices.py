from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from shoal.bench import MODELS, measure_devices
from shoal.bench.case import MEMORY_SPENT, Case, MemorySpentError, Milliseconds, Speed
from shoal.bench.devices import Measuring, spreading
from shoal.bench.rank import Stopwatch, is_memory_error, main
from shoal.cli.main import app
from shoal.errors import ConfigurationError

ONE = Case(model="logistic", accelerator="cpu", batch_size=4, steps=2, threads=1, parts=True)


def fake(case):
    """Trains 1,000 samples/s on a device, 1.8 times as many on two, and runs out of memory with batches of 64."""
    if case.batch_size >= 64:
        raise MemorySpentError(f"{case}: out of memory")
    parts = Milliseconds(mean=1.5, sd=0.25) if case.parts else None
    return Speed(
        samples_per_second=1000.0 if case.count == 1 else 1800.0,
        peak_bytes=tuple(2**20 * (rank + 1) for rank in range(case.count)),
        forward=parts,
        backward=parts,
    )


def test_the_tables_of_a_cpu():
    told: list[str] = []
    tables = measure_devices(model="har", batch_size=32, epoch=9000, accelerator="cpu", run=fake, tell=told.append)
    found = json.loads(json.dumps(tables.as_json()))
    assert set(found) == {"model", "device", "threads", "epoch", "configurations", "precisions", "sweep"}
    assert (found["model"], found["device"], found["epoch"]) == ("har", "CPU", 9000)
    single, ddp, fsdp = found["configurations"]
    assert single == {
        "strategy": "single",
        "precision": "fp32",
        "batch_size": 32,
        "effective_batch": 32,
        "devices": 1,
        "out_of_memory": False,
        "samples_per_second": 1000.0,
        "seconds_per_epoch": 9.0,
        "speedup": 1.0,
        "peak_bytes": [2**20],
        "forward_ms": {"mean": 1.5, "sd": 0.25},
        "backward_ms": {"mean": 1.5, "sd": 0.25},
    }
    assert (ddp["strategy"], ddp["devices"], ddp["effective_batch"]) == ("ddp", 2, 64)
    assert (ddp["speedup"], ddp["seconds_per_epoch"], ddp["peak_bytes"]) == (1.8, 5.0, [2**20, 2**21])
    assert {**fsdp, "strategy": "ddp"} == ddp
    assert [row["precision"] for row in found["precisions"]] == ["fp32", "bf16"]
    assert found["precisions"][0] == single  # not measured twice
    assert found["precisions"][1]["forward_ms"] is None
    assert len(told) == 3 + 1 + 4 + 1


def test_a_sweep_doubles_the_batch_until_the_memory_is_spent():
    told: list[str] = []
    rows = Measuring(fake, told.append).sweep(ONE, largest=None)
    assert [row.case.batch_size for row in rows] == [8, 16, 32, 64]
    assert [row.speed is None for row in rows] == [False, False, False, True]
    assert told[-1] == "logistic, single, fp32, batches of 64: out of memory"
    assert rows[-1].as_json(rows[0], epoch=1) == {
        "strategy": "single",
        "precision": "fp32",
        "batch_size": 64,
        "effective_batch": 64,
        "devices": 1,
        "out_of_memory": True,
    }


@pytest.mark.parametrize(("largest", "sizes"), [(7, []), (8, [8]), (31, [8, 16]), (32, [8, 16, 32])])
def test_a_sweep_ends_with_the_largest_batch(largest, sizes):
    assert [row.case.batch_size for row in Measuring(fake, print).sweep(ONE, largest)] == sizes


def test_nothing_is_compared_with_a_device_that_had_too_little_memory():
    found = measure_devices(model="mlp", batch_size=64, accelerator="cpu", largest=8, run=fake).as_json()
    assert [row["out_of_memory"] for row in found["configurations"]] == [True, True, True]
    assert [row["speedup"] for row in found["sweep"]] == [None]


@pytest.mark.parametrize(
    ("strategies", "present", "on_cpu", "found"),
    [
        (None, 1, False, []),
        (None, 2, True, [("ddp", 2), ("fsdp", 2)]),
        (None, 2, False, [("dp", 2), ("ddp", 2), ("fsdp", 2)]),
        (["ddp"], 8, False, [("ddp", 2), ("ddp", 4), ("ddp", 8)]),
        (["fsdp", "dp"], 6, False, [("dp", 2), ("dp", 4), ("dp", 6), ("fsdp", 2), ("fsdp", 4), ("fsdp", 6)]),
        (["ddp"], 3, False, [("ddp", 2), ("ddp", 3)]),
        (["single"], 1, False, []),
    ],
)
def test_several_devices_are_two_and_twice_as_many_and_all(strategies, present, on_cpu, found):
    assert spreading(strategies, present, on_cpu=on_cpu) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "lenett"}, "unknown model 'lenett'; did you mean 'lenet'"),
        ({"batch_size": 0}, "batch-size must be at least 1, not 0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"epoch": -1}, "epoch must be at least 1, not -1"),
        ({"largest": 0}, "largest must be at least 1, not 0"),
        ({"threads": 0}, "threads must be ≥ 1, not 0"),
        ({"strategies": ["dpp"]}, "unknown strategy 'dpp'; did you mean"),
        ({"strategies": ["dp"]}, "strategy 'dp' copies a model among CUDA devices: on a CPU use 'ddp'"),
        ({"accelerator": "tpu"}, "unknown accelerator 'tpu'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(settings, message):
    def run(case):
        raise AssertionError(case)

    with pytest.raises(ConfigurationError, match=message):
        measure_devices(**{"model": "mlp", "accelerator": "cpu", "run": run, **settings})


def test_one_device_cannot_be_several():
    with pytest.raises(ConfigurationError, match="strategy 'ddp' spreads a model over devices, and this machine has 1"):
        spreading(["ddp"], 1, on_cpu=False)


def test_it_starts_its_ranks_itself(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="leave the launcher out"):
        measure_devices(model="mlp", run=fake)


def test_a_rank_measures_forward_backward_memory_and_leaves_a_trace(tmp_path, monkeypatch):
    trace, answer = tmp_path / "ddp-1" / "rank-0.json", tmp_path / "speed.json"
    case = {"model": "har", "accelerator": "cpu", "batch_size": 3, "steps": 4, "threads": 1, "parts": True}
    assert main([json.dumps({**case, "strategy": "ddp", "trace": str(trace)}), str(answer)]) == 0
    found = json.loads(answer.read_text())
    assert found["samples_per_second"] > 0
    assert [peak > 2**26 for peak in found["peak_bytes"]] == [True]
    assert found["forward"]["mean"] > 0
    assert found["backward"]["mean"] > 0
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("Optimizer.step#SGD.step") == 5


def test_a_stopwatch_that_does_not_run_takes_nothing():
    watch = Stopwatch(torch.device("cpu"))
    layer = torch.nn.Linear(2, 2)
    optimizer = watch.optimizer(layer.parameters())
    for running in (False, True, True):
        watch.running = running
        watch.loss(layer(watch.transform(torch.ones(1, 2))), torch.zeros(1, dtype=torch.int64)).backward()
        optimizer.step()
    assert (len(watch.forward), len(watch.backward)) == (2, 2)


@pytest.mark.parametrize(
    ("error", "by_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_rank_tells_the_end_of_the_memory_from_other_errors(error, by_memory, monkeypatch, tmp_path):
    def fail(case):
        raise error

    monkeypatch.setattr("shoal.bench.rank.measure", fail)
    assert is_memory_error(error) is by_memory
    arguments = ['{"model": "mlp", "accelerator": "cpu", "batch_size": 1, "steps": 1}', str(tmp_path / "none")]
    if by_memory:
        assert main(arguments) == MEMORY_SPENT
    else:
        with pytest.raises(RuntimeError, match="mat1"):
            main(arguments)
    assert not (tmp_path / "none").exists()


RUN = """
import json, sys
from shoal.bench.case import Case, run_case
for asked in json.loads(sys.argv[1]):
    case = Case(accelerator="cpu", steps=2, threads=1, **asked)
    try:
        speed = run_case(case)
        print("measured", speed.samples_per_second > 0, len(speed.peak_bytes), speed.forward)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_ranks_are_started_and_their_ends_told_apart():
    """Of the largest batch nothing is taken: the allocator refuses what no machine has."""
    cases = [
        {"model": "logistic", "strategy": "fsdp", "count": 2, "batch_size": 4},
        {"model": "logistic", "batch_size": 2**40},
        {"model": "none", "batch_size": 1},
    ]
    command = [sys.executable, "-c", RUN, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    measured, spent, failed = done.stdout.splitlines()
    assert measured == "measured True 2 None"
    assert spent == "MemorySpentError logistic, single, fp32, batches of 1099511627776: out of memory"
    assert re.fullmatch(
        r"WorkerError none, single, .*: rank 0 \(process \d+\) ended with exit code 1: KeyError: 'none'", failed
    )


def test_the_command_prints_tables_or_json_and_draws_a_page(monkeypatch, tmp_path):
    def measured(**options):
        return measure_devices(**options, run=fake)

    monkeypatch.setattr("shoal.bench.measure_devices", measured)
    words = ["bench", "devices", "--model", "har", "--accelerator", "cpu", "--batch-size", "32", "--largest", "64"]
    shown = CliRunner().invoke(app, [*words, "--plot", str(tmp_path / "page.html")])
    assert shown.exit_code == 0, shown.output
    for text in ("2, fsdp", "1.80", "1.50 ± 0.25", "1 to 2", "out of memory", "bf16"):
        assert text in shown.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("Plotly.newPlot(") >= 5
    assert "har on the devices of this machine" in page
    printed = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert len(printed["configurations"]) == 3
    only = json.loads(CliRunner().invoke(app, [*words, "--strategy", "ddp", "--json"]).stdout)
    assert [row["strategy"] for row in only["configurations"]] == ["single", "ddp"]
    refused = CliRunner().invoke(app, [*words, "--plot", "page.png"])
    assert refused.exit_code == 2
    assert "--plot draws an HTML page: give it a name such as page.html" in refused.output
    helped = CliRunner().invoke(app, ["bench", "devices", "--help"]).output
    assert all(name in helped for name in MODELS)
