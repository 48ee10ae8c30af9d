"""Jobs of sites as tests run them: quickly, with faults, and with a look at what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch.distributed.elastic.agent.server.local_elastic_agent
import torch.distributed.launcher.api  # noqa: F401

import shoal
import shoal.federation.job
from process_table import alive, children, eventually
from shoal.processes.table import marked
from shoal.randomness import further_seed
from shoal.sites.address import FOLDER, Address
from shoal.sites.process import start_forked
from site_script import SIZE, examples_of, trained

SCRIPT = Path(__file__).parent / "site_script.py"

START = np.linspace(-1, 1, SIZE, dtype=np.float32)


def start_quickly(script, args):
    """Is in the place of :func:`shoal.sites.process.start_script`: the ranks are forked, with everything imported."""

    def body(site):
        sys.argv = [script, *args, *site.args]
        sys.path.insert(0, str(Path(script).parent))
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit:
            raise
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    return start_forked(body)


def family(pid):
    """Returns all processes that descend from one."""
    return [one for child in children(pid) for one in (child, *family(child))]


def site_of(name, ranks):
    """Returns a site with the settings that the script asks for."""
    return shoal.Site(name, devices=ranks, config={"examples": examples_of(name)})


class Jobs:
    """Makes jobs that run the script of :mod:`site_script`, and knows of all their processes and folders.

    Args:
        folder: For what the processes note down.
    """

    def __init__(self, folder):
        self.folders = []
        self.pids = folder / "pids"
        self.pids.mkdir()
        self.temporary = folder / "temporary"
        self.temporary.mkdir()

    def job(self, sites, *, faults=None, pause=0.0, evaluate=False, **settings):
        """Returns a job.

        Args:
            sites: The number of ranks of each, by name.
            faults: What goes wrong, by site.
            pause: Seconds that each task takes.
            evaluate: Whether the script measures too.
            settings: Of the job.
        """
        told = {"pids": str(self.pids), "faults": faults or {}, "pause": pause, "evaluate": evaluate}
        settings = {"rounds": 4, "waits": shoal.Deadlines(reply=20, silence=3, finish=20)} | settings
        return shoal.Job(
            "try",
            script=SCRIPT,
            args=[json.dumps(told)],
            model={"w": START},
            sites=[site_of(name, ranks) for name, ranks in sites.items()],
            accelerator="cpu",
            **settings,
        )

    def processes(self):
        """Returns the processes of all jobs, as far as they have said that they are there."""
        return [int(file.name) for file in self.pids.iterdir()]

    def left(self):
        """Returns what is there yet of all jobs: processes, folders and temporary files."""
        marks = [pid for folder in self.folders for pid in marked(FOLDER, str(folder))]
        own = [pid for pid in self.processes() if alive(pid) and pid != os.getpid()]
        return marks + own + [str(path) for path in (*self.folders, *self.temporary.glob("shoal-*")) if path.exists()]

    @contextlib.contextmanager
    def watched(self, monkeypatch, *, quick):
        """The context in which jobs run in this process: nothing of them is there at its end."""
        before, create = family(os.getpid()), Address.create

        def noted(kind):
            address = create.__func__(kind)
            self.folders.append(address.folder)
            return address

        monkeypatch.setattr(Address, "create", classmethod(noted))
        monkeypatch.setattr(tempfile, "tempdir", str(self.temporary))
        if quick:
            monkeypatch.setattr(shoal.federation.job, "start_script", start_quickly)
        yield self
        assert eventually(lambda: set(family(os.getpid())) <= set(before), 1.0)
        assert not self.left()


def expected(present, *, rounds=4, seed=0):
    """Returns the weights after some rounds, of the definition of a weighted mean.

    Args:
        present: The sites by their numbers, each with the rounds whose mean it is part of.
        rounds: How many.
        seed: The job's.
    """
    weights = START
    for number in range(1, rounds + 1):
        there = [(client, site) for client, (site, those) in enumerate(present.items()) if number in those]
        total = sum(examples_of(site) for _, site in there)
        weights = sum(
            examples_of(site) / total * trained(weights, further_seed(seed, "site", round=number, client=client))
            for client, site in there
        )
    return weights


def said(error):
    """Returns an error with its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])
