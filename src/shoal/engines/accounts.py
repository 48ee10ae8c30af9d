"""Exceptions that travel: what a worker tells the others of what ended it, or a client of its share."""

from __future__ import annotations

import traceback
from typing import Any

from shoal.errors import ClientError, ConfigurationError, ShoalError, Terminated, WorkerError, by_sigterm

Account = dict[str, Any]
"""What is told of an exception, as JSON."""


def one_line(error: BaseException) -> str:
    """Returns an exception's message, headed by its class where that is none of shoal's own."""
    return str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"


def told(error: BaseException) -> Account:
    """Returns what the others are told of an exception."""
    refused = isinstance(error, ConfigurationError)
    kind = "refused" if refused else "failed"
    if isinstance(error, KeyboardInterrupt):
        kind = "terminated" if by_sigterm(error) else "interrupted"
    return {
        "kind": kind,
        "what": one_line(error),
        "trace": "" if refused else "".join(traceback.format_exception(error)),
    }


def end_of(worker: str, account: Account) -> BaseException:
    """Returns what another worker's end means here: its exit code, and its traceback as a note.

    Args:
        worker: What messages call it.
        account: What it told.
    """
    kind, what = account["kind"], account["what"]
    if kind == "interrupted":
        return KeyboardInterrupt(f"{worker} was interrupted")
    if kind == "terminated":
        return Terminated(f"{worker} was ended by SIGTERM")
    if kind == "refused":
        return ConfigurationError(f"{worker}: {what}")
    error = WorkerError(f"{worker} failed: {what}")
    error.add_note(account["trace"])
    return error


def client_error(account: Account) -> ClientError:
    """Returns the exception of another worker's client, with its traceback as a note."""
    error = ClientError(account["what"])
    error.add_note(account["trace"])
    return error
