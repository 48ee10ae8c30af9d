"""How a command ends: the exit codes, and what is said on the way out."""

from __future__ import annotations

import functools
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec

import typer

from shoal.errors import ClientError, ConfigurationError, RunInterrupted, ShoalError

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143

P = ParamSpec("P")


class Terminated(KeyboardInterrupt):
    """SIGTERM came: it ends a run as Ctrl-C does, with its state saved."""


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Makes a command end with a documented code and one line in place of what it raises."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(_report_interrupt(interrupt)) from interrupt
        except ShoalError as error:
            raise typer.Exit(_report_error(error)) from error

    return run


def _terminate(_signum: int, _frame: FrameType | None) -> None:
    raise Terminated


def _report_interrupt(interrupt: KeyboardInterrupt) -> int:
    said = str(interrupt) if isinstance(interrupt, RunInterrupted) else "stopped before the first round"
    print(f"\nshoal: {said}", file=sys.stderr)
    by_signal = isinstance(interrupt, Terminated) or isinstance(interrupt.__cause__, Terminated)
    return TERMINATED if by_signal else INTERRUPTED


def _report_error(error: ShoalError) -> int:
    if isinstance(error, ClientError) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    print(f"shoal: error: {error}", file=sys.stderr)
    return REFUSED if isinstance(error, ConfigurationError) else FAILED
