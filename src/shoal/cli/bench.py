"""``shoal bench``: measuring on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.bench_devices import devices
from shoal.cli.bench_sites import sites
from shoal.cli.exits import guarded
from shoal.cli.launch import among_workers, launch_if_asked

if TYPE_CHECKING:
    from shoal.bench import Measurement

bench = typer.Typer(name="bench", help="Measure engines and devices on this machine.", no_args_is_help=True)


def simulate(
    model: Annotated[str, typer.Option(help="logistic, mlp, mlp10m, har, lenet, resnet18gn or transformer.")] = "lenet",
    population: Annotated[int, typer.Option(help="Number of clients.")] = 1000,
    cohort: Annotated[int, typer.Option(help="Clients in a round.")] = 100,
    samples: Annotated[int, typer.Option(help="Samples of each client.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 10,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 8,
    engine: Annotated[str, typer.Option(help="Where the cohort runs.")] = "auto",
    block_size: Annotated[int | None, typer.Option(help="Clients in a block of the vectorized engine.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Clients at once of the process engine.")] = None,
    clients_per_process: Annotated[
        int | None, typer.Option(help="Clients that a child of the process engine trains.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes on this machine that share each cohort.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:1 for the second GPU.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, for the baseline too.")] = "fp32",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of one operation; torch's default if left out.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="In turn, as a ratio: loop, or spawn for a process a client."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time rounds of federated averaging on random data."""
    launch_if_asked(workers)
    import dataclasses

    from shoal.bench import simulate as measure
    from shoal.cli.devices import parse_device
    from shoal.experiments.overrides import named_engine

    settings = {"block_size": block_size, "max_concurrent": max_concurrent, "clients_per_process": clients_per_process}
    given = {name: str(value) for name, value in settings.items() if value is not None}
    with among_workers():
        found = measure(
            model=model,
            population=population,
            cohort=cohort,
            samples=samples,
            batch_size=batch_size,
            rounds=rounds,
            engine=named_engine(engine, given) if given else engine,
            devices=dataclasses.replace(parse_device(device, precision), threads=threads),
            baseline=baseline,
        )
    if found is None:
        return  # the first worker prints
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _print_table(found)


for command in (simulate, devices, sites):
    bench.command()(guarded(command))


def _print_table(found: Measurement) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    blocks = f", blocks of {found.block_size}" if found.block_size else ""
    workers = f"{found.workers} workers, each " if found.workers > 1 else ""
    table.add_row("engine", f"{workers}{found.engine}{blocks}, {found.threads} threads")
    table.add_row("model", found.model)
    table.add_row("a round", f"{found.seconds_per_round * 1e3:.1f} ms (median)")
    table.add_row("speed", f"{found.clients_per_second:,.0f} clients/s, {found.samples_per_second:,.0f} samples/s")
    whose = "the process" if found.workers == 1 else "all processes"
    table.add_row("peak memory", f"{found.peak_host_bytes / 2**20:,.0f} MiB of {whose}")
    if found.peak_device_bytes:
        table.add_row("", f"{found.peak_device_bytes / 2**20:,.0f} MiB of the device")
    if found.baseline_ratio is not None:
        table.add_row("baseline", f"takes {found.baseline_ratio:.2f} times as long")
    Console().print(table, markup=False, highlight=False, soft_wrap=True)
