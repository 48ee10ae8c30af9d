"""What one wants to know first of a run, as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.runs.folder import RunData
from shoal.runs.metrics import held_out_metrics, in_order, number
from shoal.runs.selection import best_record


@dataclass(frozen=True)
class Fact:
    """One of them."""

    label: str
    """What it is; the same for each run of a kind."""
    value: str
    """The fact itself."""
    detail: str = ""
    """Its circumstances, which differ between runs: the epoch of a best value."""


def facts(run: RunData) -> list[Fact]:
    """Returns a run's outcome, then what it took."""
    return _training_facts(run) if run.unit == "epoch" else _federation_facts(run)


def leading_metric(run: RunData) -> str | None:
    """Returns what a training's best model is chosen by; None where nothing was measured."""
    measured = {name for record in run.metrics for name in held_out_metrics(record)}
    wanted = (run.config.get("identity", {}).get("metric"), "accuracy", "loss", *in_order(measured))
    return next((name for name in wanted if name in measured), None)


def devices_of(run: RunData) -> Mapping[str, Any]:
    """Returns the devices that a training asked for; empty where its folder does not say."""
    devices: Mapping[str, Any] = run.config.get("environment", {}).get("devices") or {}
    return devices


def _federation_facts(run: RunData) -> list[Fact]:
    records = run.metrics
    if not records:
        return [Fact("rounds", "0")]
    found: list[Fact] = []
    measured = [record for record in records if held_out_metrics(record)]
    if measured:
        found += _outcome(run, measured, held_out_metrics(measured[-1]))
    seconds = sum(record["seconds"] for record in records)
    clients = sum(record["clients"] for record in records)
    return [
        *found,
        Fact("rounds", f"{len(records):,}"),
        Fact("client updates", f"{clients:,}"),
        Fact("training time", _duration(seconds)),
        Fact("clients per second", f"{clients / seconds:,.0f}" if seconds else "–"),
        Fact("sent down and up", _size(sum(record["bytes_down"] + record["bytes_up"] for record in records))),
    ]


def _training_facts(run: RunData) -> list[Fact]:
    records, planned = run.metrics, run.config.get("identity", {}).get("epochs")
    of = f" of {planned:,}" if planned and planned != len(records) else ""
    epochs = Fact("epochs", f"{len(records):,}{of}")
    if not records:
        return [epochs, *_how(run)]
    lead = leading_metric(run)
    if lead is None:
        trained = in_order(key.removeprefix("train_") for key in records[-1] if key.startswith("train_"))
        shown = [(name, records[-1][f"train_{name}"]) for name in trained[:2]]
        found = [Fact(f"final training {name}", _decimal(value)) for name, value in shown if value is not None]
    else:
        measured = [record for record in records if record.get(lead) is not None]
        names = held_out_metrics(measured[-1])
        found = _outcome(run, measured, sorted(names, key=lambda name: (name != lead, name != "loss")))
    seconds = sum(record["seconds"] for record in records)
    examples = sum(record["examples"] for record in records)
    return [
        *found,
        Fact("training time", _duration(seconds)),
        Fact("samples per second", f"{examples / seconds:,.0f}" if seconds else "–"),
        epochs,
        Fact("samples trained on", f"{examples:,}"),
        *_how(run),
        *_memory(run),
    ]


def _outcome(run: RunData, measured: list[dict[str, Any]], names: list[str]) -> list[Fact]:
    """Returns the last and the best value of the first metric, and the last one of the second."""
    first, *others = names
    last, best = measured[-1], best_record(measured, first) or measured[-1]
    return [
        Fact(f"final {first}", _decimal(last[first])),
        Fact(f"best {first}", _decimal(best[first]), f"{run.unit} {number(best)}"),
        *(Fact(f"final {name}", _decimal(last[name])) for name in others[:1]),
    ]


def _how(run: RunData) -> list[Fact]:
    """Returns how a training's steps were divided, as far as its folder says."""
    found, devices = [], devices_of(run)
    if batch := run.config.get("environment", {}).get("batch"):
        parts = [f"{batch['per_device']:,}"]
        parts += [f"{batch['devices']} devices"] if batch["devices"] > 1 else []
        parts += [f"{batch['accumulate']} accumulated"] if batch["accumulate"] > 1 else []
        effective = batch["per_device"] * batch["devices"] * batch["accumulate"]
        found.append(Fact("batch", f"{effective:,}", " × ".join(parts) if len(parts) > 1 else ""))
    if devices:
        where = "" if devices["accelerator"] == "auto" else f" on {devices['accelerator']}"
        found.append(Fact("strategy", devices["strategy"], f"{devices['precision']}{where}"))
    return found


def _memory(run: RunData) -> list[Fact]:
    rows = [record["memory_bytes"] for record in run.metrics if record.get("memory_bytes")]
    if not rows:
        return []
    whose = "largest rank" if max(map(len, rows)) > 1 else ""
    if devices_of(run).get("strategy") == "dp":
        whose = "first device"
    return [Fact("peak memory", _size(max(map(max, rows))), whose)]


def _decimal(value: float) -> str:
    return f"{value:.4f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for name in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {name}"
        count /= 1000
    return f"{count:.3g} TB"
