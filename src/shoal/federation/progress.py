"""What a person sees while a federation runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from shoal.federation.callbacks import Callback, Record, RunInfo
from shoal.runs.bars import run_bars

if TYPE_CHECKING:
    from shoal.federation.result import FederationResult


SLOW = 2.0
"""Seconds after which a round has a line of its own on a terminal, too, and its time in place of clients per second."""


class Progress(Callback):
    """Shows rounds, metrics, clients per second and the time left; plain lines where there is no terminal.

    Args:
        console: Where to; None for standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bars = run_bars(self._console)
        self._rounds = self._bars.add_task("round", start=False, told="")
        self._total = 0
        self._told = ""
        self._said: set[str] = set()

    def on_run_start(self, run: RunInfo) -> None:
        """Says what begins, and starts the bar on a terminal."""
        self._total = run.rounds
        who = f"{run.population} clients, {run.cohort} a round, {run.rounds} rounds"
        self._print(f"{run.name}: {who}" + (f", in {run.run_dir}" if run.run_dir else ""))
        self._say(run.notices)
        if self._console.is_terminal:
            self._bars.update(self._rounds, total=run.rounds, completed=run.first_round - 1)
            self._bars.start_task(self._rounds)
            self._bars.start()

    def on_round_end(self, record: Record) -> None:
        """Moves the bar; prints a line where there is none, or the round was slow."""
        measured = [f"{name} {record[name]:.4f}" for name in _shown(record)]
        self._told = " · ".join(measured) or self._told
        slow = record["seconds"] > SLOW
        speed = f"{record['seconds']:.1f} s" if slow else f"{record['clients_per_second']:.0f} clients/s"
        if slow or not self._console.is_terminal:
            self._print(" · ".join([f"round {record['round']}/{self._total}", *measured, speed]))
        if self._console.is_terminal:
            self._bars.update(self._rounds, completed=record["round"], told=f"{self._told} · {speed}")

    def on_run_end(self, result: FederationResult) -> None:
        """Shows the final table."""
        self._bars.stop()
        self._console.print(_final_table(result), highlight=False, soft_wrap=True)
        self._say(result.notices)

    def close(self) -> None:
        """Gives the terminal back."""
        self._bars.stop()

    def _say(self, notices: Sequence[str]) -> None:
        for notice in notices:
            if notice not in self._said:
                self._print(notice, style="dim")
                self._said.add(notice)

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _shown(record: Record) -> list[str]:
    """Returns the names of the metrics worth a place in one line: the global model's, else the clients' own."""
    pairs = (("accuracy", "client_accuracy"), ("loss", "client_loss"))
    usual = [next(name for name in pair if name in record) for pair in pairs if not record.keys().isdisjoint(pair)]
    return usual or [name for name in ("train_loss",) if name in record]


def _final_table(result: FederationResult) -> Table:
    history = result.history
    seconds = sum(record["seconds"] for record in history)
    clients = sum(record["clients"] for record in history)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("rounds", f"{len(history)}, {result.stopped}")
    table.add_row(
        "training",
        f"{seconds:.1f} s, {clients} clients" + (f", {clients / seconds:.0f}/s" if 0 < seconds < clients else ""),
    )
    last = history[-1] if history else {}
    for name in _shown(last):
        table.add_row(name, f"{last[name]:.4f}")
    if result.best is not None:
        table.add_row(f"best {result.best.metric}", f"{result.best.value:.4f} after round {result.best.round}")
    if result.run_dir is not None:
        table.add_row("model", str(result.run_dir / "model.safetensors"))
        if (report := result.run_dir / "report.html").exists():
            table.add_row("report", str(report))
    return table
