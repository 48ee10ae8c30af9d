"""``shoal bench devices``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from shoal.bench import DeviceTables

NOTHING = "–"


def devices(
    model: Annotated[
        str, typer.Option(help="logistic, mlp, mlp10m, har, lenet, resnet18gn or transformer.")
    ] = "mlp10m",
    batch_size: Annotated[int, typer.Option(help="Samples of a step on each device.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 30,
    epoch: Annotated[int, typer.Option(help="Samples of the epoch whose time is told.")] = 50_000,
    strategy: Annotated[
        list[str] | None, typer.Option(help="dp, ddp or fsdp; again for several. All that can be if left out.")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of one operation; on a CPU the cores divided by the ranks.")
    ] = None,
    largest: Annotated[
        int | None, typer.Option(help="Largest batch of the sweep; else until the memory is spent, or 1024 on a CPU.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Folder for profiler traces of each configuration.")] = None,
    plot: Annotated[Path | None, typer.Option(help="HTML file for the figures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time a model's training on one device and on several: speed, memory, batch sizes and precisions."""
    from shoal.bench import measure_devices
    from shoal.bench.device_page import check_page, write_page

    if plot is not None:
        check_page(plot)
    tables = measure_devices(
        model=model,
        batch_size=batch_size,
        steps=steps,
        epoch=epoch,
        strategies=strategy,
        accelerator=accelerator,
        threads=threads,
        largest=largest,
        trace=trace,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if plot is not None:
        write_page(tables, plot)
    if as_json:
        print(json.dumps(tables.as_json(), indent=2))
    else:
        _print_tables(tables)


def _print_tables(tables: DeviceTables) -> None:
    from rich.console import Console

    told, console = tables.as_json(), Console()
    each = f", {tables.threads} CPU threads for each device" if tables.threads else ""
    console.print(f"{tables.model} on {tables.device}{each}", markup=False, highlight=False, soft_wrap=True)
    found, speed = told["configurations"], ["samples/s", "s an epoch", "speed-up"]
    rows = [[_configuration(row), f"{row['effective_batch']:,}", *_speed(row)] for row in found]
    _print_table(console, "Speed", ["devices", "batch of all", *speed], rows)
    rows = [[_configuration(row), _time(row, "forward"), _time(row, "backward"), _peak(row)] for row in found]
    _print_table(console, "A step of rank 0", ["devices", "forward ms", "backward ms", "peak MiB of a device"], rows)
    rows = [[row["precision"], *_speed(row), _peak(row)] for row in told["precisions"]]
    _print_table(console, "Precisions, on one device", ["precision", *speed, "peak MiB"], rows)
    rows = [[f"{row['batch_size']:,}", *_speed(row), _peak(row)] for row in told["sweep"]]
    _print_table(console, "Batch sizes, on one device", ["batch", *speed, "peak MiB"], rows)


def _print_table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table, markup=False, highlight=False, soft_wrap=True)


def _configuration(row: dict[str, Any]) -> str:
    return "1, single" if row["strategy"] == "single" else f"{row['devices']}, {row['strategy']}"


def _speed(row: dict[str, Any]) -> list[str]:
    """Returns the cells of throughput, time and speed-up."""
    if row["out_of_memory"]:
        return ["out of memory", NOTHING, NOTHING]
    ratio = NOTHING if row["speedup"] is None else f"{row['speedup']:.2f}"
    return [f"{row['samples_per_second']:,.0f}", f"{row['seconds_per_epoch']:.2f}", ratio]


def _time(row: dict[str, Any], part: str) -> str:
    found = row.get(f"{part}_ms")
    return NOTHING if found is None else f"{found['mean']:.2f} ± {found['sd']:.2f}"


def _peak(row: dict[str, Any]) -> str:
    """Returns the peak memory of a device, or the least and the most of several."""
    if row["out_of_memory"]:
        return NOTHING
    least, most = (f"{peak(row['peak_bytes']) / 2**20:,.0f}" for peak in (min, max))
    return most if least == most else f"{least} to {most}"
