"""The round boundary of sites on this machine: global parameters in, update out; and the server's memory.

    python benchmarks/sites.py --megabytes 100 --sites 2 8 --ranks 1 2

Each site replies with what it was sent, so that a round is all transport and server. One process a row, so that the
peak of one says nothing of the next.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import shoal.client
for task in shoal.client.tasks():
    task.reply(params=task.params, examples=1)
"""

PART = 1 << 20
"""Numbers in one of the model's arrays."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the model")
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--row", action="store_true", help="measure one case in this process, and print it as JSON")
    given = parser.parse_args()
    if given.row:
        print(json.dumps(row(given.megabytes, given.sites[0], given.ranks[0], given.rounds)))
        return
    print(f"model {given.megabytes} MB, {given.rounds} rounds; seconds are of a round by the number of sites")
    print("| sites | ranks | start-up, s | round a site, s: median (min–max) | server's peak, × model |")
    print("|---|---|---|---|---|")
    for sites in given.sites:
        for ranks in given.ranks:
            words = ["--megabytes", given.megabytes, "--sites", sites, "--ranks", ranks, "--rounds", given.rounds]
            command = [sys.executable, __file__, "--row", *map(str, words)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            told = json.loads(done.stdout)
            each = [seconds / sites for seconds in told["seconds"]]
            span = f"{statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f})"
            print(
                f"| {sites} | {ranks} | {told['start']:.1f} | {span} | {told['peak'] / told['model']:.2f} |", flush=True
            )


def row(megabytes: int, sites: int, ranks: int, rounds: int) -> dict[str, object]:
    """Returns what one case takes: the rounds' seconds but for the first, and the server's memory."""
    import time
    from functools import partial

    import torch

    import shoal
    from shoal import federation

    class Clock(shoal.Callback):
        def __init__(self) -> None:
            self.times = [time.perf_counter()]

        def on_run_start(self, info: object) -> None:  # noqa: ARG002
            self.times.append(time.perf_counter())

        def on_round_end(self, record: object) -> None:  # noqa: ARG002
            self.times.append(time.perf_counter())

    class Parts(torch.nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.parts = torch.nn.ParameterList(torch.ones(PART) for _ in range(count))

    count = megabytes * 10**6 // (4 * PART)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "client.py"
        script.write_text(SCRIPT)
        clock = Clock()
        job = shoal.Job(
            "boundary",
            script=script,
            model=partial(Parts, count),
            sites=[shoal.Site(f"site-{number}", devices=ranks) for number in range(sites)],
            rounds=rounds,
            accelerator="cpu",
        )
        federation.run_experiment  # noqa: B018 - all of the package's own code is there before the memory is looked at
        before = _status("VmRSS")
        job.run(callbacks=[clock])
    gaps = [after - earlier for earlier, after in zip(clock.times, clock.times[1:], strict=False)]
    peak = (_status("VmHWM") - before) * 1024
    return {"start": gaps[0] + gaps[1], "seconds": gaps[2:], "peak": peak, "model": count * PART * 4}


def _status(field: str) -> int:
    """Returns a line of the process's status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


if __name__ == "__main__":
    main()
