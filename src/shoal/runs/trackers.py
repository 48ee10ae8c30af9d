"""Where metrics go beside ``metrics.jsonl``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from shoal.errors import MissingExtraError


class Tracker(Protocol):
    """Takes the metrics of each round."""

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one round."""
        ...  # pragma: no cover

    def close(self) -> None:
        """Writes what is still held back."""
        ...  # pragma: no cover


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
    """

    def __init__(self, folder: Path, *, first_round: int = 1) -> None:
        require_tensorboard()
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(folder),
            purge_step=first_round if first_round > 1 else None,
            filename_suffix=f".{os.getpid()}.{first_round}",  # its own names repeat within a second
        )

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one round, as scalars of their names."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is still held back."""
        self._writer.close()
