"""Runs the same federation on several engines, and prints what each takes: memory, time a round, accuracy."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from processes import device_memory, host_memory

HERE = Path(__file__).parent.resolve()
SHOAL = (sys.executable, "-m", "shoal")
ENGINES = ("sequential", "vectorized", "process")
REAL = ("flower", "nvflare")
POPULATIONS = (10, 100, 1_000, 10_000)
HEAD = ("clients", "engine", "host memory", "device memory", "time a round", "accuracy")


def main() -> None:
    asked = arguments()
    names = os.environ.get("ENGINE", " ".join(ENGINES)).replace(",", " ").split()
    print(row(HEAD), row("---" for _ in HEAD), sep="\n", flush=True)
    if asked.memory:
        # Ten batches for each client, whatever it has, so that only the number of clients differs.
        runs = [(clients, 10, 3, ["--set", "steps=10"]) for clients in POPULATIONS]
    else:
        runs = [(asked.clients, asked.fit_clients, asked.rounds, [])]
    for clients, fit_clients, rounds, more in runs:
        for engine in names:
            print(row(measured(engine, clients, fit_clients, rounds, more)), flush=True)


def arguments() -> argparse.Namespace:
    """Reads the command line; what cannot be is refused before anything starts."""
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__)
    parser.add_argument("clients", metavar="NBCLIENTS", nargs="?", type=positive, default=2)
    parser.add_argument("min_clients", metavar="NBMINCLIENTS", nargs="?", type=positive, default=2)
    parser.add_argument("fit_clients", metavar="NBFITCLIENTS", nargs="?", type=positive, default=2)
    parser.add_argument("rounds", metavar="NBROUNDS", nargs="?", type=positive, default=3)
    parser.add_argument("--memory", action="store_true", help="10 to 10,000 clients, of which 10 train in a round")
    asked = parser.parse_args()
    if asked.min_clients > asked.clients:
        parser.error(f"a round that waits for {asked.min_clients} clients never begins with {asked.clients}")
    if asked.fit_clients > asked.clients:
        parser.error(f"{asked.fit_clients} clients cannot be sampled from {asked.clients}")
    if asked.clients > 60_000:
        parser.error(f"{asked.clients} clients cannot share 60,000 images")
    return asked


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def measured(engine: str, clients: int, fit_clients: int, rounds: int, more: list[str]) -> tuple[str, ...]:
    """Runs one federation in a process of its own, and returns its row of the table."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        words = ["federate", str(HERE / "experiment.py"), "--engine", engine]
        words += ["--clients", str(clients), "--cohort", str(fit_clients), "--rounds", str(rounds)]
        words += ["--run-dir", f"{folder}/run", "--set", "tensorboard=false", *more]
        before = device_memory()
        others: list[int] = []
        if engine in REAL:
            place = Path(folder, "deployment")
            others = stack.enter_context(deployed(engine, clients, place))
            words += ["--deployment", str(place)]
        with subprocess.Popen([*SHOAL, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            host, device = watched(process, others)
            said = process.stdout.read() if process.stdout else ""
        if process.returncode:
            raise SystemExit(said)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return (
        f"{clients:,}",
        engine,
        f"{host / 2**20:,.0f} MiB",
        f"{(device - before) / 2**20:,.0f} MiB" if device else "–",
        f"{median(record['seconds'] for record in records):.2f} s",
        f"{records[-1]['accuracy']:.4f}",
    )


@contextmanager
def deployed(engine: str, sites: int, place: Path) -> Iterator[list[int]]:
    """A server and as many real sites as there are clients, on this machine; gives the processes that were started."""
    words = ["deploy", "up", "--engine", engine, "--sites", str(sites), "--allow", str(HERE / "experiment.py")]
    words += ["--folder", str(place), "--within", str(60 + 30 * sites)]
    done = subprocess.run([*SHOAL, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    try:
        yield [entry["pid"] for entry in json.loads((place / "processes.json").read_text()).values()]
    finally:
        subprocess.run([*SHOAL, "deploy", "down", "--folder", str(place)], check=True, stdout=subprocess.DEVNULL)


def watched(process: subprocess.Popen[str], others: Sequence[int]) -> tuple[int, int]:
    """Returns the most memory, in bytes, that processes and their children had, and that the device had."""
    host = device = 0
    while process.poll() is None:
        host, device = max(host, host_memory(process.pid, *others)), max(device, device_memory())
        time.sleep(0.05)
    return host, device


def row(cells: object) -> str:
    return "| " + " | ".join(cells) + " |"  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
