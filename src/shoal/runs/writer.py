"""What a run writes as it goes on, beside its checkpoints."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from shoal.errors import MissingExtraError, StorageError
from shoal.runs.checkpoints import save_model
from shoal.runs.folder import RunFolder
from shoal.runs.metrics import MetricsLog, number, scalars
from shoal.runs.report import write_report
from shoal.runs.trackers import Ending, TensorBoardTracker, TrackerProcess
from shoal.types import Params
from shoal.version import __version__


class RunWriter:
    """Writes metrics, the model and the report, and has trackers follow; without a folder it does nothing.

    Args:
        folder: The open run folder, or None.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self.notices: list[str] = list(folder.notices) if folder else []
        """One line each that a reader of the result should know."""
        self._tensorboard: TensorBoardTracker | None = None
        self._trackers: list[TrackerProcess] = []
        self._metrics = None if folder is None else MetricsLog(folder.metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        try:
            self.close_trackers("finished" if kind is None else "interrupted" if interrupted else "failed")
        finally:
            if self.folder is not None:
                self.folder.close()

    @property
    def path(self) -> Path | None:
        """The run folder's path."""
        return None if self.folder is None else self.folder.path

    def open_trackers(self, tensorboard: bool | None, others: Sequence[str], first: int) -> None:
        """Starts TensorBoard events, or leaves a notice where the library is missing and they were not asked for.

        Args:
            tensorboard: None: where the library is installed.
            others: The other trackers' names; each gets what it has not got yet.
            first: The round or epoch that the run goes on with. Events of it and later ones replace the old ones.
        """
        if self.folder is None:
            return
        if tensorboard is not False:
            try:
                self._tensorboard = TensorBoardTracker(self.folder.tensorboard, first_round=first)
            except MissingExtraError as error:
                if tensorboard:
                    raise
                self.notices.append(f"no TensorBoard events: {error}")
        self._trackers += [TrackerProcess(name, self.folder.path) for name in dict.fromkeys(others)]

    def close_trackers(self, ending: Ending) -> None:
        """Lets the trackers go when they have everything, or when their time is over; one that failed is a notice."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        for tracker in self._trackers:
            tracker.end(ending)
        for tracker in self._trackers:
            tracker.close()
        self._hear_trackers()

    def _hear_trackers(self) -> None:
        self.notices += [notice for tracker in self._trackers if (notice := tracker.notice()) is not None]

    def forget_after(self, last: int) -> None:
        """Removes the records of later rounds or epochs, which the run will write again."""
        if self._metrics is not None:
            self._metrics.truncate(last)

    def record(self, record: Mapping[str, Any]) -> None:
        """Adds the metrics of a round or epoch."""
        if self._metrics is not None:
            self._metrics.append(record)
        if self._tensorboard is not None:
            self._tensorboard.log(number(record), scalars(record))
        for tracker in self._trackers:
            tracker.poke()
        self._hear_trackers()

    def deliver(self, params: Params, told: Mapping[str, Any]) -> None:
        """Writes the model to use.

        Args:
            params: As the user's module loads it.
            told: Where it is from, as JSON.
        """
        if self.folder is not None:
            # One key, because the format keeps several in no order, and equal runs shall leave equal files.
            save_model(self.folder.model, params, {"shoal": json.dumps({"version": __version__, **told})})

    def report(self) -> None:
        """Draws the report, or leaves a notice: a run whose model is delivered does not fail for want of a picture."""
        if self.folder is None:
            return
        try:
            write_report([self.folder.path])
        except (MissingExtraError, StorageError) as error:
            self.notices.append(f"no report: {error}")


def environment(**own: Any) -> dict[str, Any]:
    """Returns what a run is made with, and further facts, as JSON."""
    versions = {"shoal": __version__, "python": platform.python_version(), "numpy": np.__version__}
    for name in ("torch", "tensorflow"):
        if name in sys.modules:  # reported where it is in use, never imported for it
            versions[name] = str(sys.modules[name].__version__)
    return {"versions": versions, "platform": platform.platform(), **own, "command": sys.argv}
