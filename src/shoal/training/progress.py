"""What a person sees while a training runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from shoal.runs.bars import run_bars
from shoal.training.callbacks import Progressed, Record, TrainingCallback, TrainingInfo

if TYPE_CHECKING:
    from shoal.training.result import TrainingResult

SHOWN = ("accuracy", "loss")
"""The metrics worth a place in one line."""


class TrainingProgress(TrainingCallback):
    """Shows steps, loss, accuracy, samples per second of all devices and the time left; plain lines without a terminal.

    Args:
        console: Where to; None for standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bars = run_bars(self._console, speed_over=120.0)
        self._steps = self._bars.add_task("step", start=False, told="")
        self._epochs = 0

    def on_train_start(self, training: TrainingInfo) -> None:
        """Says what begins, and starts the bar on a terminal."""
        self._epochs = training.epochs
        what = f"{training.examples} examples, {training.epochs} epochs, {training.steps} steps"
        self._print(f"{training.name}: {what}" + (f", in {training.run_dir}" if training.run_dir else ""))
        self._print(_step_in_words(training))
        if training.rates != training.base_rates:
            self._print(_rates_in_words(training))
        for notice in training.notices:
            self._print(notice, style="dim")
        if self._console.is_terminal:
            self._bars.update(self._steps, total=training.steps, completed=training.first_step)
            self._bars.start_task(self._steps)
            self._bars.start()

    def on_steps(self, progressed: Progressed) -> None:
        """Moves the bar."""
        means = [f"{name} {progressed.means[name]:.4f}" for name in SHOWN if name in progressed.means]
        told = [f"epoch {progressed.epoch}/{self._epochs}", *means, f"{progressed.samples_per_second:,.0f} samples/s"]
        self._bars.update(self._steps, completed=progressed.step, told=" · ".join(told))

    def on_epoch_end(self, record: Record) -> None:
        """Prints a line."""
        trained = [f"train {name} {record[f'train_{name}']:.4f}" for name in SHOWN if f"train_{name}" in record]
        measured = [f"{name} {record[name]:.4f}" for name in SHOWN if name in record]
        told = [f"epoch {record['epoch']}/{self._epochs}", *trained, *measured]
        told += [f"lr {record['learning_rate']:.3g}"] if "learning_rate" in record else []
        speed = f"{record['samples_per_second']:,.0f} samples/s"
        self._print(" · ".join([*told, speed, f"{record['seconds']:.1f} s"]))

    def on_train_end(self, result: TrainingResult) -> None:
        """Shows the final tables."""
        self._bars.stop()
        if result.classes:
            self._console.print(_class_table(result), highlight=False)
        self._console.print(_final_table(result), highlight=False, soft_wrap=True)
        for notice in result.notices:
            self._print(notice, style="dim")

    def close(self) -> None:
        """Gives the terminal back."""
        self._bars.stop()

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _step_in_words(training: TrainingInfo) -> str:
    devices, count = training.devices, training.device_count
    parts = [f"{training.per_device} examples a device"]
    parts += [f"{count} devices"] if count > 1 else []
    parts += [f"{training.accumulate} accumulated"] if training.accumulate > 1 else []
    effective = training.per_device * count * training.accumulate
    how = f"{devices.strategy}, {devices.precision}"
    return f"batch: {' × '.join(parts)} = {effective} a step ({how})"


def _rates_in_words(training: TrainingInfo) -> str:
    factor = training.rates[0] / training.base_rates[0] if training.base_rates[0] else 1.0
    pairs = zip(training.base_rates, training.rates, strict=True)
    told = [f"{base:g} × {factor:g} = {rate:g}" for base, rate in pairs]
    return f"learning rate, scaled with the batch: {', '.join(dict.fromkeys(told))}"


def _class_table(result: TrainingResult) -> Table:
    table = Table(box=None, pad_edge=False, title="held-out data by class", title_justify="left", title_style="bold")
    for name in ("class", "precision", "recall", "f1", "examples"):
        table.add_column(name, justify="right")
    for report in result.classes:
        numbers = (f"{value:.3f}" for value in (report.precision, report.recall, report.f1))
        table.add_row(str(report.label), *numbers, str(report.examples))
    return table


def _final_table(result: TrainingResult) -> Table:
    history: Sequence[Record] = result.history
    seconds = sum(record["seconds"] for record in history)
    examples = sum(record["examples"] for record in history)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("epochs", f"{len(history)}, {result.stopped}")
    speed = f", {examples / seconds:,.0f} samples/s" if seconds else ""
    table.add_row("training", f"{seconds:.1f} s, {examples:,} samples{speed}")
    last = history[-1] if history else {}
    for name in SHOWN:
        if name in last:
            table.add_row(name, f"{last[name]:.4f}")
    if result.best is not None:
        table.add_row(f"best {result.best.metric}", f"{result.best.value:.4f} after epoch {result.best.epoch}")
    if result.run_dir is not None:
        table.add_row("model", str(result.run_dir / "model.safetensors"))
        if (report := result.run_dir / "report.html").exists():
            table.add_row("report", str(report))
    return table
