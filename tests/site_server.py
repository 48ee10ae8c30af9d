"""Programs that run a job of sites: one as a user's, and the command with an exported job."""

from __future__ import annotations

import json
import sys

import shoal
import shoal.cli.main
import shoal.federation.job
from site_jobs import SCRIPT, START, site_of, start_quickly

ROUNDS = 12


def main():
    """Takes a folder, ``quick`` to fork the ranks, and ``resume`` to go on with the run."""
    folder, quick, resume = sys.argv[1], sys.argv[2] == "quick", sys.argv[3] == "resume"
    if quick:
        shoal.federation.job.start_script = start_quickly
    job = shoal.Job(
        "try",
        script=SCRIPT,
        args=[json.dumps({"pids": f"{folder}/pids", "pause": 0.1})],
        model={"w": START},
        sites=[site_of("site-1", 1), site_of("site-2", 2)],
        rounds=ROUNDS,
        accelerator="cpu",
        settings={"tensorboard": False},
    )
    result = job.run(run_dir=f"{folder}/run", resume=resume)
    print("RESULT", result.params["w"].tobytes().hex(), flush=True)


def command():
    """Is ``shoal`` with the arguments that it is given, whose sites' ranks are forked."""
    shoal.federation.job.start_script = start_quickly
    shoal.cli.main.main()


if __name__ == "__main__":
    main()
