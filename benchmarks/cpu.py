#!/usr/bin/env python3
"""The tables of docs/benchmarks.md that need no GPU, as Markdown on standard output: benchmarks/cpu.py > cpu.md

About 12 minutes on two cores. Each figure is the median of several processes, because how fast a plain loop is depends
on where the C library happens to put its memory.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys

AGAINST_THE_LOOP = [
    ("logistic", "vectorized", 1),
    ("logistic", "sequential", 1),
    ("mlp", "vectorized", 1),
    ("mlp", "vectorized", 2),
    ("mlp", "sequential", 1),
    ("lenet", "vectorized", 1),
    ("lenet", "vectorized", 2),
    ("lenet", "sequential", 1),
]
COHORTS = (100, 1_000, 10_000)
BY_COHORT = [("logistic", 100), ("mlp", 20), ("logistic", None)]
"""Models and block sizes, which are fixed because it is the cohort that is compared; None is for ``sequential``."""
LONGEST = 900
"""Seconds that one run may take."""


def measure(shoal: str, **options: str | int) -> dict[str, float]:
    """Returns what ``shoal bench simulate`` says, or ends this program with what it complains of."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [*shlex.split(shoal), "bench", "simulate", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def spread(values: list[float], digits: int = 2) -> str:
    """Returns a median with the least and the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def against_the_loop(shoal: str, repeats: int) -> None:
    """Prints how many times as fast as a plain loop the engines are."""
    print("| model | engine | workers | ms a round | loop: ms a round | times the loop | host MiB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {row: [] for row in AGAINST_THE_LOOP}
    for _ in range(repeats):
        for model, engine, workers in AGAINST_THE_LOOP:
            options = {"model": model, "engine": engine, "baseline": "loop"} | (
                {"workers": workers} if workers > 1 else {}
            )
            found[model, engine, workers].append(measure(shoal, **options))
    for (model, engine, workers), runs in found.items():
        ours = [1e3 * run["seconds_per_round"] for run in runs]
        loops = [1e3 * run["seconds_per_round"] * run["baseline_ratio"] for run in runs]
        memory = max(run["peak_host_bytes"] for run in runs) / 2**20
        ratios = [run["baseline_ratio"] for run in runs]
        cells = (model, engine, workers, spread(ours, 1), spread(loops, 1), spread(ratios), f"{memory:.0f}")
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def by_cohort(shoal: str, repeats: int) -> None:
    """Prints what a client costs in cohorts of several sizes."""
    print("| model | engine |", " | ".join(f"{cohort:,} a round" for cohort in COHORTS), "| most / least |")
    print("|---|---|", "---:|" * len(COHORTS), "---:|", sep="")
    for model, block in BY_COHORT:
        options: dict[str, str | int] = {"engine": "sequential"}
        if block is not None:
            options = {"engine": "vectorized", "block-size": block}
        costs: dict[int, list[float]] = {cohort: [] for cohort in COHORTS}
        for _ in range(repeats):
            for cohort in COHORTS:
                run = measure(shoal, model=model, population=max(COHORTS), cohort=cohort, rounds=4, **options)
                costs[cohort].append(1e6 / run["clients_per_second"])
        medians = [statistics.median(costs[cohort]) for cohort in COHORTS]
        engine = "sequential" if block is None else f"vectorized, blocks of {block}"
        cells = [model, engine, *(spread(costs[cohort], 0) for cohort in COHORTS), f"{max(medians) / min(medians):.2f}"]
        print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    """Reads the options and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shoal", default="shoal", help="the command")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each figure of the first table")
    options = parser.parse_args()
    machine = subprocess.check_output([*shlex.split(options.shoal), "doctor"], text=True)
    print("\n".join(f"- {line.rstrip()}" for line in machine.splitlines() if "not installed" not in line))
    print(f"- medians of {options.repeats} processes, with the least and the most\n")
    against_the_loop(options.shoal, options.repeats)
    print("\nMicroseconds a client:\n")
    by_cohort(options.shoal, options.repeats)


if __name__ == "__main__":
    main()
