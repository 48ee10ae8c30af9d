"""What a tracker's process does: it hands a run's records over, from ``metrics.jsonl``, each of them once."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.runs.files import write_json
from shoal.runs.folder import METRICS, RunData, read_run
from shoal.runs.metrics import number, parsed, scalars
from shoal.runs.trackers.base import Tracker
from shoal.runs.trackers.process import LATE, Ending

STATE = "state.json"
"""Says in a tracker's folder what it calls the run, and which record it got last."""


class Requests(threading.Thread):
    """Hears what the run asks for. A process that is asked to end does so before its deadline, whatever it waits for.

    Args:
        pipe: Where the run writes: a line for each record, at last how it ended. The pipe's end is an interruption.
        deadline: Seconds.
    """

    def __init__(self, pipe: int, *, deadline: float) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._deadline = deadline
        self._asked = threading.Event()
        self._ending: Ending | None = None
        self.start()

    def run(self) -> None:
        """Reads until the run has ended."""
        while self._ending is None:
            words = b""
            while not words.endswith(b"\n") and (more := os.read(self._pipe, 65536)):
                words += more
            if not words.endswith(b"\n"):
                self._ending = "interrupted"
            elif said := words.split():
                self._ending = said[-1].decode()  # type: ignore[assignment]
            self._asked.set()
        late = threading.Timer(self._deadline, os._exit, (LATE,))
        late.daemon = True
        late.start()

    def wait(self) -> Ending | None:
        """Returns when there may be something to do: how the run ended, or None while it goes on."""
        self._asked.wait()
        self._asked.clear()
        return self._ending


class Follower:
    """Hands the records that a tracker has not got to it.

    Args:
        name: The tracker.
        run: The run's folder, open in another process.
    """

    def __init__(self, name: str, run: Path) -> None:
        self._name = name
        self._run = run
        self._offset = 0
        self._tracker: Tracker | None = None
        self._last = 0

    def catch_up(self) -> None:
        """Hands over what is new; after an error the next call goes on where this one stopped."""
        tracker = self._tracker or self._open()
        before = self._last
        try:
            for record, end in self._records():
                if number(record) > self._last:
                    tracker.log(number(record), scalars(record))
                    self._last = number(record)
                self._offset = end
        finally:
            if self._last != before and tracker.lasting:
                self._remember(tracker)

    def close(self, ending: Ending) -> None:
        """Lets the tracker go."""
        if self._tracker is not None:
            self._tracker.close(ending)
            self._remember(self._tracker)

    def _open(self) -> Tracker:
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads((self._run / self._name / STATE).read_text(encoding="utf-8"))
        data = read_run(self._run)
        self._tracker = tracker = _opened(self._name, data, known)
        self._last = known["last"] if known.get("id") == tracker.known["id"] else 0
        self._remember(tracker)
        tracker.describe(data.config)
        return tracker

    def _remember(self, tracker: Tracker) -> None:
        write_json(self._run / self._name / STATE, {**tracker.known, "last": self._last})

    def _records(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yields the whole records from where the last one ended, and where each ends."""
        path = self._run / METRICS
        if not path.exists():
            return
        with path.open("rb") as stream:
            stream.seek(self._offset)
            end = self._offset
            for line in stream:
                end += len(line)
                if (record := parsed(line)) is None:
                    return
                yield record, end


def follow(name: str, run: Path, requests: Requests, answers: int) -> int:
    """Follows a run until it ends; the first error becomes one line of answer, and all are tried again.

    Args:
        name: The tracker.
        run: The run's folder.
        requests: What the run asks for.
        answers: Where the line is written to.

    Returns:
        The process's exit code.
    """
    follower = Follower(name, run)
    failed = False
    ending = None
    while ending is None:
        ending = requests.wait()
        try:
            follower.catch_up()
            if ending is not None:
                follower.close(ending)
        except Exception as error:  # whatever a library raises: the run does not end for it
            text = " ".join(str(error).split())[:300]
            if not failed:
                with contextlib.suppress(OSError):  # the run may be gone
                    os.write(answers, f"{type(error).__name__}: {text}\n".encode())
            failed = True
    return 0


def _opened(name: str, data: RunData, known: dict[str, Any]) -> Tracker:
    if name == "mlflow":
        from shoal.runs.trackers.mlflow import MlflowTracker

        return MlflowTracker(data, known)
    from shoal.runs.trackers.wandb import WandbTracker

    return WandbTracker(data, known)
