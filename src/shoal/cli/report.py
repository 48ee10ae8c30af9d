"""``shoal report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared on one page.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file to write.")] = None,
) -> None:
    """Draw the HTML report of a run, or compare several runs on one page."""
    from shoal.runs import write_report

    if output is None and len(runs) > 1:
        output = Path("report.html")
    print(write_report(runs, output))
