"""The loggers of a Trainer that is called again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


@contextmanager
def left_open(trainer: Trainer) -> Iterator[None]:
    """Has the calls of a trainer within the block write out its TensorBoard files, but not close them.

    By itself each call closes the file, and the next begins another: one for each ``fit``, ``validate`` and ``test`` of
    each round. tensorboardX names them by the second, and so a call overwrites what another has logged in the same one.
    """
    kept = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    for logger in kept:
        vars(logger)["finalize"] = partial(_write_out, logger)
    try:
        yield
    finally:
        for logger in kept:
            del vars(logger)["finalize"]


def _write_out(logger: TensorBoardLogger, status: str) -> None:
    writer: Any = logger._experiment  # noqa: SLF001 - the public name would open a file
    if writer is not None:  # rank 0 has it
        writer.flush()
    if status == "success":
        logger.save()
