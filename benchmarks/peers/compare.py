"""Runs the same federated rounds in shoal, pfl-research and Flower by turns, and writes a table of what they took."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVS = Path(os.environ.get("PEERS_ENVS", HERE / ".envs"))
SHOAL = os.environ.get("PEERS_SHOAL", "shoal")

MODELS = ("logistic", "mlp", "lenet")
WORK = {"population": 1000, "cohort": 100, "samples": 50, "batch-size": 10, "rounds": 8}
WARMUP = 2  # the first round of a peer makes data and starts actors, and pfl evaluates in it
CORES = 2

COLUMNS = {
    "shoal": "shoal, 1 process",
    "shoal-2": "shoal, 2 workers",
    "pfl": "pfl, 1 process",
    "pfl-2": "pfl, 2 processes",
    "flower": "Flower",
    "flower-legacy": "Flower, `start_simulation`",
}
SYSTEMS = {"shoal": ("shoal", "shoal-2"), "pfl": ("pfl", "pfl-2"), "flower": ("flower", "flower-legacy")}


class FailedError(Exception):
    """A run gave no figure; the text says why."""


@dataclass
class Results:
    """What was measured.

    Attributes:
        times: Milliseconds per client of each repetition, by model and column.
        failures: Why there is no figure, by model and column.
        versions: Versions of packages, by column.
    """

    times: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def median(self, model: str, column: str) -> float | None:
        """Returns the median over the repetitions, or None where a run failed."""
        if (model, column) in self.failures or (model, column) not in self.times:
            return None
        return statistics.median(self.times[model, column])


def command(model: str, column: str) -> list[str]:
    """Returns the command that runs one model in one column."""
    options = [part for name, value in WORK.items() for part in (f"--{name}", str(value))]
    if column.startswith("shoal"):
        workers = ["--workers", "2"] if column == "shoal-2" else []
        return [SHOAL, "bench", "simulate", "--model", model, *options, "--engine", "auto", *workers, "--json"]
    options += ["--model", model, "--warmup", str(WARMUP), "--cores", str(CORES)]
    if column == "pfl":
        return [str(ENVS / "pfl/bin/python"), str(HERE / "run_pfl.py"), *options]
    if column == "pfl-2":
        torchrun = [str(ENVS / "pfl/bin/torchrun"), "--standalone", "--nproc-per-node", "2"]
        return [*torchrun, str(HERE / "run_pfl.py"), *options]
    return [str(ENVS / "flower/bin/python"), str(HERE / f"run_{column.replace('-', '_')}.py"), *options]


def environment() -> dict[str, str]:
    """Returns the environment of a run: no telemetry, and Ray's actors find the client's module."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, **quiet, "PYTHONPATH": str(HERE)}


def cause(errors: str) -> str:
    """Returns the line of standard error that tells most: the last that names an error, else the last."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if "Error: " in line]
    return (telling or lines or ["nothing on standard error"])[-1]


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a run: torchrun and Ray keep processes outside its group, which they end themselves if asked politely."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(arguments: list[str], time_limit: float) -> str:
    """Runs a command and returns its standard output.

    Args:
        arguments: The command.
        time_limit: Seconds after which it is stopped.

    Raises:
        FailedError: When it cannot be started, takes too long, or does not end with 0.
    """
    try:
        process = subprocess.Popen(
            arguments,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        raise FailedError(f"could not start {arguments[0]}: {error.strerror}") from error
    try:
        output, errors = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        raise FailedError(f"took longer than the limit of {time_limit:g} s") from None
    finally:
        if process.returncode is None:  # too slow, or this script was interrupted
            stop(process)
    if process.returncode != 0:
        print(errors, file=sys.stderr)
        raise FailedError(f"exit code {process.returncode}: {cause(errors)}")
    return output


def answer(output: str, model: str) -> dict[str, Any]:
    """Returns the JSON object that a run printed.

    Raises:
        FailedError: When there is none, or it is not about this model.
    """
    for line in [output, *reversed(output.splitlines())]:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.get("model") == model and "seconds_per_round" in found:
            return found
    raise FailedError(f"printed no JSON object with seconds_per_round for {model}")


def shoal_versions() -> dict[str, str]:
    """Asks the interpreter beside the command ``shoal`` for versions, since its answer has none."""
    python = Path(shutil.which(SHOAL) or SHOAL).with_name("python")
    code = (
        "import importlib.metadata as m, json; print(json.dumps({p: m.version(p) for p in ('shoal','torch','numpy')}))"
    )
    try:
        versions: dict[str, str] = json.loads(run([str(python), "-c", code], 60))
    except (FailedError, ValueError):
        return {"shoal": "unknown"}
    return versions


def measure(model: str, column: str, results: Results, time_limit: float) -> None:
    """Runs one model in one column once and notes what came of it; what failed before is left out."""
    if (model, column) in results.failures:
        return
    try:
        found = answer(run(command(model, column), time_limit), model)
    except FailedError as error:
        results.failures[model, column] = str(error)
        print(f"{column} {model}: FAILED, {error}", file=sys.stderr, flush=True)
        return
    milliseconds = 1000 * found["seconds_per_round"] / WORK["cohort"]
    results.times.setdefault((model, column), []).append(milliseconds)
    if column not in results.versions:
        versions = found.get("versions") or shoal_versions()
        results.versions[column] = versions | ({"engine": found["engine"]} if "engine" in found else {})
    print(f"{column} {model}: {milliseconds:.2f} ms per client", file=sys.stderr, flush=True)


def row(cells: list[str]) -> str:
    """Joins the cells of one row."""
    return f"| {' | '.join(cells)} |"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lays out a Markdown table whose figures are aligned to the right."""
    return [row(header), row(["---"] + ["---:"] * (len(header) - 1)), *map(row, rows)]


def time_cell(results: Results, model: str, column: str) -> str:
    """Tells median, least and most milliseconds, or that it failed."""
    median = results.median(model, column)
    if median is None:
        return "**failed**"
    times = results.times[model, column]
    return f"{median:.2f} ({min(times):.2f}–{max(times):.2f})"


def ratio_cell(results: Results, model: str, column: str, own: str) -> str:
    """Tells how many times as long a peer took."""
    peer, ours = results.median(model, column), results.median(model, own)
    return "–" if peer is None or ours is None else f"{peer / ours:.2f}"


def tables(results: Results, models: list[str], columns: list[str]) -> list[str]:
    """Returns the lines of the times, the ratios and the failures."""
    rows = [[model, *(time_cell(results, model, column) for column in columns)] for model in models]
    lines = ["Milliseconds per client: median (least–most) of the repetitions.", ""]
    lines += [*table(["model", *(COLUMNS[column] for column in columns)], rows), ""]
    peers = [column for column in columns if not column.startswith("shoal")]
    if peers and len(peers) < len(columns):
        header = ["model", "against", *(COLUMNS[peer] for peer in peers)]
        rows = [
            [model, COLUMNS[own], *(ratio_cell(results, model, peer, own) for peer in peers)]
            for model in models
            for own in columns
            if own not in peers
        ]
        lines += ["How many times as long as shoal (above 1: shoal is faster).", "", *table(header, rows), ""]
    for (model, column), reason in results.failures.items():
        lines.append(f"- **{COLUMNS[column]} failed on {model}**: {reason}")
    return [*lines, ""] if results.failures else lines


def processor() -> str:
    """Returns the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def page(results: Results, options: argparse.Namespace, columns: list[str], cores: int) -> str:
    """Returns the whole text: tables, machine, date, versions and command."""
    work = ", ".join(f"{name} {value}" for name, value in WORK.items())
    lines = ["# The same rounds in shoal, pfl-research and Flower", ""]
    lines += tables(results, options.models, columns)
    used = min(CORES, cores)
    lines += [
        f"- work: {work}, repetitions {options.repeats}",
        f"- machine: {processor()}, {used} of {cores} cores used, {platform.system()} {platform.release()}",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        f"- command: `{options.command}`",
    ]
    for column, versions in results.versions.items():
        lines.append(f"- {COLUMNS[column]}: {', '.join(f'{name} {text}' for name, text in versions.items())}")
    return "\n".join(lines) + "\n"


def chosen(known: tuple[str, ...], text: str) -> list[str]:
    """Splits a list at its commas; raises what argparse turns into a message."""
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def positive(text: str) -> int:
    """Reads a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", type=lambda text: chosen(tuple(SYSTEMS), text), default=list(SYSTEMS))
    parser.add_argument("--models", type=lambda text: chosen(MODELS, text), default=list(MODELS))
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each system and model (default 3)")
    parser.add_argument("--time-limit", type=positive, default=600, help="seconds for one run (default 600)")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    options.command = shlex.join(["benchmarks/peers/run.sh", *arguments])
    return options


def main() -> int:
    """Measures, writes, and returns 1 if anything failed."""
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run in progress is stopped too
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, available[:CORES])  # inherited by every run, so that all have the same cores
    columns = [column for system in SYSTEMS if system in options.systems for column in SYSTEMS[system]]
    results = Results()
    for repetition in range(options.repeats):
        for model in options.models:
            # Back and forth, so that a machine that slows down or warms up favours nobody.
            for column in columns if repetition % 2 == 0 else reversed(columns):
                measure(model, column, results, options.time_limit)
    text = page(results, options, columns, len(available))
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
