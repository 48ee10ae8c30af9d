"""``shoal bench sites``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.errors import ConfigurationError

if TYPE_CHECKING:
    from shoal.bench.sites import SiteCost


def sites(
    sizes: Annotated[str, typer.Option(help="Megabytes of the model, with commas between.")] = "1,10,100",
    sites: Annotated[int, typer.Option(help="How many sites, all on this machine.")] = 2,
    ranks: Annotated[int, typer.Option(help="Processes of each site.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed, after one that is not.")] = 5,
    engine: Annotated[
        list[str] | None, typer.Option(help="local, flower or nvflare; again for several. local if left out.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Run the engine's own FedAvg over as many bytes too, in turn.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Time rounds of sites that hardly train: what moving the model costs, and the server's memory."""
    from shoal.bench.sites import as_json as told
    from shoal.bench.sites import measure_sites

    found = measure_sites(
        sizes=_numbers(sizes),
        sites=sites,
        ranks=ranks,
        rounds=rounds,
        engines=engine or ["local"],
        baseline=baseline,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if as_json:
        print(json.dumps(told(found), indent=2))
    else:
        _print_table(found)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--sizes takes numbers with commas between, as in 1,10,100, not {text!r}") from error


def _print_table(found: list[SiteCost]) -> None:
    from rich.console import Console
    from rich.table import Table

    head = ["engine", "MB", "round s", "site s", "overhead s", "moved MB", "peak MB", "× model"]
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for cost in found:
        table.add_row(
            f"{cost.engine} FedAvg" if cost.own else cost.engine,
            f"{cost.size_mb:g}",
            f"{cost.seconds:.2f}",
            "–" if cost.own else f"{cost.training_seconds:.2f}",
            f"{cost.overhead_seconds:.2f}",
            f"{cost.bytes_moved / 1e6:,.0f}",
            f"{cost.memory_bytes / 1e6:,.0f}",
            f"{cost.memory_models:.1f}",
        )
    console = Console()
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(
        "medians over rounds; site is the slowest one's own time, overhead the rest; the peak is of the server's\n"
        "processes together, beyond what they take with a model of next to nothing",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
