"""Rounds of shoal's own sites on this machine, each case in a process of its own, whose memory is the server's."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Self

from shoal.bench.site_case import SiteCase, SiteRun
from shoal.errors import EngineError
from shoal.runs import read_metrics

WITHIN = 3600.0
"""Seconds that one case may take."""


class LocalSites:
    """Starts the sites anew for each case."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, case: SiteCase, folder: Path) -> SiteRun:
        """Runs a federation, and returns what was noted of it.

        Raises:
            EngineError: It did not end well.
        """
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "shoal.bench.local_sites", json.dumps(dataclasses.asdict(case))]
        log = folder / "log"
        with log.open("wb") as out:
            process = subprocess.Popen([*command, str(folder / "run")], stdout=out, stderr=subprocess.STDOUT)
            try:
                code = process.wait(WITHIN)
            except subprocess.TimeoutExpired as error:
                raise EngineError(f"local sites with {case.size_mb:g} MB took more than {WITHIN:g} s") from error
            finally:
                if process.poll() is None:
                    process.terminate()  # at which it ends its sites
                    process.wait()
        if code:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise EngineError(f"local sites with {case.size_mb:g} MB ended with exit code {code}:\n{last}")
        records = read_metrics(folder / "run" / "metrics.jsonl")
        return SiteRun(records=records, memory_bytes=records[-1]["memory_bytes"])


def main() -> None:
    """Is the process: ``python -m shoal.bench.local_sites CASE FOLDER``."""
    from shoal.experiments.payload import experiment
    from shoal.federation import Job
    from shoal.sites import Site

    told, folder = sys.argv[1:]
    case = SiteCase(**json.loads(told))
    made = experiment(size_mb=case.size_mb, clients=case.sites)
    sites = [
        Site(f"site-{number + 1}", devices=case.ranks, data=data)
        for number, data in enumerate(made.clients[: case.sites])
    ]
    job = Job(
        made.name,
        learner=made.learner,
        sites=sites,
        rounds=case.rounds + 1,
        accelerator="cpu",
        settings={"checkpoint_every": made.checkpoint_every},
    )
    job.run(run_dir=folder)


if __name__ == "__main__":
    main()
