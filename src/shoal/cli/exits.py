"""How a command ends: the exit codes, and what is said on the way out."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec

import typer

from shoal.cli.child import LAUNCHER
from shoal.errors import ClientError, ConfigurationError, ShoalError, Terminated, by_sigterm

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143

AGAIN = 3.0
"""Seconds in which a further signal means no more than the first."""

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Makes a command end with a documented code and one line in place of what it raises."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        signals = _Signals()
        try:
            command(*args, **kwargs)
        except (KeyboardInterrupt, ShoalError) as error:
            signals.calm()
            _report(error)
            raise typer.Exit(exit_code(error)) from error
        finally:
            signals.calm()

    return run


class _Signals:
    """SIGINT and SIGTERM end a command, once: a terminal and a launcher may both send them, also on its way out."""

    def __init__(self) -> None:
        self._deaf_until = 0.0
        signal.signal(signal.SIGTERM, self._end)
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # which it is not in the background
            signal.signal(signal.SIGINT, self._end)

    def calm(self) -> None:
        """Ends what the signals do for a while."""
        self._deaf_until = time.monotonic() + AGAIN

    def _end(self, number: int, _frame: FrameType | None) -> None:
        if time.monotonic() < self._deaf_until:
            return
        self.calm()
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def exit_code(error: BaseException) -> int:
    """Returns the documented exit code of a command that an exception has ended."""
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if by_sigterm(error) else INTERRUPTED
    return REFUSED if isinstance(error, ConfigurationError) else FAILED


def _report(error: KeyboardInterrupt | ShoalError) -> None:
    if isinstance(error, KeyboardInterrupt):
        if not str(error) and LAUNCHER in os.environ:
            return  # the launcher ended this process, and says why
        print(f"\nshoal: {str(error) or 'stopped before it began'}", file=sys.stderr)
        return
    if isinstance(error, ClientError) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    for note in getattr(error, "__notes__", ()):  # another worker's traceback
        print(note, file=sys.stderr)
    print(f"shoal: error: {error}", file=sys.stderr)
