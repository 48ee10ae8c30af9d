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
            said = str(interrupt) if isinstance(interrupt, RunInterrupted) else "stopped before the first round"
            print(f"\nshoal: {said}", file=sys.stderr)
            raise typer.Exit(exit_code(interrupt)) from interrupt
        except ShoalError as error:
            _report(error)
            raise typer.Exit(exit_code(error)) from error

    return run


def _terminate(_signum: int, _frame: FrameType | None) -> None:
    raise Terminated


def exit_code(error: BaseException) -> int:
    """Returns the documented exit code of a command that an exception has ended."""
    if isinstance(error, KeyboardInterrupt):
        by_signal = isinstance(error, Terminated) or isinstance(error.__cause__, Terminated)
        return TERMINATED if by_signal else INTERRUPTED
    return REFUSED if isinstance(error, ConfigurationError) else FAILED


def _report(error: ShoalError) -> None:
    if isinstance(error, ClientError) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    for note in getattr(error, "__notes__", ()):  # another worker's traceback
        print(note, file=sys.stderr)
    print(f"shoal: error: {error}", file=sys.stderr)
