"""How a command ends: the exit codes, and what is said on the way out."""

from __future__ import annotations

import functools
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec

import typer

from shoal.errors import ClientError, ConfigurationError, ShoalError, Terminated, by_sigterm

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Makes a command end with a documented code and one line in place of what it raises."""
    ended = threading.Event()

    def terminate(_signum: int, _frame: FrameType | None) -> None:
        if not ended.is_set():  # a launcher sends it to all workers when one has ended, also to those on their way out
            raise Terminated

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, terminate)
        try:
            command(*args, **kwargs)
        except (KeyboardInterrupt, ShoalError) as error:
            ended.set()
            _report(error)
            raise typer.Exit(exit_code(error)) from error
        finally:
            ended.set()

    return run


def exit_code(error: BaseException) -> int:
    """Returns the documented exit code of a command that an exception has ended."""
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if by_sigterm(error) else INTERRUPTED
    return REFUSED if isinstance(error, ConfigurationError) else FAILED


def _report(error: KeyboardInterrupt | ShoalError) -> None:
    if isinstance(error, KeyboardInterrupt):
        print(f"\nshoal: {str(error) or 'stopped before the first round'}", file=sys.stderr)
        return
    if isinstance(error, ClientError) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    for note in getattr(error, "__notes__", ()):  # another worker's traceback
        print(note, file=sys.stderr)
    print(f"shoal: error: {error}", file=sys.stderr)
