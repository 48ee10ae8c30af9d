"""The bar that shows how far a run has come."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def run_bars(console: Console, *, speed_over: float = 30.0) -> Progress:
    """Returns bars with a count, what is told of a task in its field ``told``, and the time gone and left.

    Args:
        console: Where they are shown.
        speed_over: The last seconds, by whose speed the time left is estimated.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=speed_over,
    )
