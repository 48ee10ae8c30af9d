"""What stands in for ``python`` and ``shoal`` in the nursery's processes: all that they start is forked from them."""

from __future__ import annotations

import logging
import runpy
import sys
import warnings
from pathlib import Path

import shoal.federation.job
from shoal.cli.main import main
from shoal.learners import torch_launch
from site_jobs import start_quickly


def command():
    """Is ``shoal ARGUMENTS``."""
    fork_ranks()
    main()


def script():
    """Is ``python SCRIPT ARGUMENTS``."""
    fork_ranks()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).absolute().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def strict():
    """Is ``python -W error -c CODE``."""
    warnings.simplefilter("error")
    exec(compile(sys.argv.pop(1), "<code>", "exec"), {"__name__": "__main__"})


def fork_ranks():
    """Has the ranks of this process forked, those of a command and those of sites."""
    shoal.federation.job.start_script = start_quickly
    launch_ranks = torch_launch.launch_ranks
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # says which of them it ends

    def launch_forked(words, **options):
        def rank():
            sys.argv[1:] = words[3:]  # without python -m shoal
            main()

        launch_ranks(words if callable(words) else rank, **options)

    torch_launch.launch_ranks = launch_forked
