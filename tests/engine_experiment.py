"""An experiment whose sites have two ranks each, for Flower and NVFlare: its numbers are known from its definition."""

from __future__ import annotations

import json
from pathlib import Path

import shoal
from site_jobs import SCRIPT, START, expected, site_of

SITES = {"site-1": 2, "site-2": 2}


def experiment(*, pids: str, rounds: int = 3, pause: float = 0.0, min_sites: int = 0, on_failure: str = "stop"):
    """Returns a job.

    Args:
        pids: A folder in which each rank notes its process.
        rounds: How many.
        pause: Seconds that a task takes.
        min_sites: With how many sites a round may go on; 0 for all.
        on_failure: What to do about ranks that fail.
    """
    return shoal.Job(
        "two",
        script=SCRIPT,
        args=[json.dumps({"pids": pids, "pause": pause})],
        model={"w": START},
        sites=[site_of(name, ranks) for name, ranks in SITES.items()],
        rounds=rounds,
        accelerator="cpu",
        min_sites=min_sites or None,
        on_failure=on_failure,
        waits=shoal.Deadlines(start=120, reply=120, silence=10, finish=30),
        settings={"tensorboard": False},
    )


def expected_weights(rounds=3, present=None):
    """Returns the weights after some rounds.

    Args:
        rounds: How many.
        present: The rounds that each site is part of, by name; None for all.
    """
    everywhere = {name: range(1, rounds + 1) for name in SITES}
    return expected({**everywhere, **(present or {})}, rounds=rounds)


def ranks_of(pids: Path) -> list[int]:
    """Returns the processes that have noted themselves."""
    return [int(path.name) for path in pids.iterdir()]
