"""A site whose script is a learner's own training."""

from __future__ import annotations

import gc
import os
import time
import traceback
from contextlib import nullcontext

from shoal import trees
from shoal.client.loop import TaskSource
from shoal.data import Dataset, as_dataset
from shoal.errors import WorkerError
from shoal.learners.base import Learner, RankedLearner
from shoal.processes.forking import flush_output, in_new_thread
from shoal.sites import Site

FIRST = 1.0
"""Seconds that a rank lives on that has lost another, so that the launcher sees the end of that one first."""


def serve(learner: Learner, site: Site) -> None:
    """Is one rank of such a site, in a forked process: trains and measures until the tasks end.

    Args:
        learner: On the site's devices.
        site: Has the data.
    """
    gc.freeze()  # what the server's process has left is not to be collected here
    try:
        in_new_thread(lambda: _serve(learner, site))
    except BaseException as error:
        if isinstance(error, WorkerError):
            time.sleep(FIRST)
        traceback.print_exc()
        flush_output()
        os._exit(1)  # what the server's process has yet to do is not done here


def _serve(learner: Learner, site: Site) -> None:
    data = as_dataset(site.examples(), name=site.name)
    kept = site.held_out()
    held_out: Dataset | None = None if kept is None else as_dataset(kept, name=site.name)
    source = TaskSource(evaluate=held_out is not None)
    with learner.together() if isinstance(learner, RankedLearner) else nullcontext(learner) as trains:
        while (task := source.next_task()) is not None:
            if task.kind == "evaluate" and held_out is not None:
                task.reply(examples=len(held_out), metrics=trains.evaluate(task.model, held_out))
                continue
            update = trains.fit(task.broadcast, data, task.rng())
            # In float64 the difference leads to the trained numbers again, which take half the room.
            after = trees.advance(task.model.params, update.delta) | trees.advance(task.model.buffers, update.buffers)
            task.reply(params=after, examples=update.weight, metrics=update.metrics)
