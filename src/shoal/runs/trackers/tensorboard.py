"""TensorBoard's events."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import MissingExtraError
from shoal.runs.files import storing


def require_tensorboard() -> None:
    """Makes sure that TensorBoard events can be written.

    Raises:
        MissingExtraError: ``tensorboardX`` is not installed.
    """
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("tensorboardX", purpose="write TensorBoard events", extra="tracking") from error


class TensorBoardTracker:
    """Writes TensorBoard events.

    Args:
        folder: Where to.
        first_round: The round that the run begins with. Events of it and later ones, written before a crash, are
            hidden by those that follow.

    Raises:
        MissingExtraError: ``tensorboardX`` is not installed.
        StorageError: The disk is full or refuses.
    """

    def __init__(self, folder: Path, *, first_round: int = 1) -> None:
        require_tensorboard()
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        # A name for each part of a run, because the library's own repeats within a second.
        suffix = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{first_round}"
        self._path = folder / f"events.out.tfevents.{suffix}"
        with storing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            # Not the library's SummaryWriter: its thread would meet a full disk where no one can answer for it.
            self._writer = RecordWriter(str(self._path))
        self._write(file_version="brain.Event:2")
        if first_round > 1:
            self._write(step=first_round, session_log=SessionLog(status=SessionLog.START))
        self._flush()

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one round, as scalars of their names.

        Raises:
            StorageError: The disk is full or refuses.
        """
        from tensorboardX.summary import scalar

        for name, value in metrics.items():
            self._write(step=round, summary=scalar(name, value))
        self._flush()

    def close(self) -> None:
        """Closes the file. What it could not take, :meth:`log` has told."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with storing(self._path):
            self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def _flush(self) -> None:
        with storing(self._path):
            self._writer.flush()
