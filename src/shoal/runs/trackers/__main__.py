"""A tracker's process: ``python -m shoal.runs.trackers NAME RUN SECONDS``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shoal.runs.trackers.following import Requests, follow


def _main() -> int:
    name, run, deadline = sys.argv[1:]
    # The two pipes are the run's. What a library prints goes to the log, and what it asks for gets no answer.
    asked, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return follow(name, Path(run), Requests(asked, deadline=float(deadline)), answers)


if __name__ == "__main__":
    sys.exit(_main())
