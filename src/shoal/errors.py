"""What shoal raises.

::

    ShoalError
    ├── ConfigurationError (ValueError)     what was asked for cannot be; the message says what to type
    │   ├── DataError                       the data themselves are unusable (empty client, NaN, label out of range)
    │   │   └── MissingDataError            a known data set is not on this machine, and was not to be downloaded
    │   ├── RunFolderError                  the run folder belongs to another configuration or to another process
    │   ├── CannotStackError                a learner's clients cannot train as one program
    │   └── MissingExtraError (ImportError) an optional package is not installed; the message holds the pip command
    ├── ClientError (RuntimeError)          more clients failed than the run allows
    ├── WorkerError (RuntimeError)          another worker of a distributed run failed or is gone
    ├── SiteError (RuntimeError)            a site failed; a note holds the last lines of its log
    ├── EngineError (RuntimeError)          a process that clients train in, or are started from, is gone
    ├── NonFiniteError (ArithmeticError)    the server step would have made the global model NaN or infinite
    ├── CheckpointError (RuntimeError)      a checkpoint cannot be read, and no older one either
    └── StorageError (RuntimeError)         the run folder cannot be written (disk full, read-only)

    RunInterrupted (KeyboardInterrupt)      Ctrl-C or SIGTERM, after the state was saved
    Terminated (KeyboardInterrupt)          SIGTERM, where it ends a run as Ctrl-C does
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ShoalError(Exception):
    """The base of everything that shoal raises on purpose."""


class ConfigurationError(ShoalError, ValueError):
    """Something was asked for that cannot be."""


class DataError(ConfigurationError):
    """The data are unusable: an empty client, NaN, a label out of range."""


class MissingDataError(DataError):
    """A known data set is not on this machine, and was not to be downloaded."""


class RunFolderError(ConfigurationError):
    """A run folder belongs to another configuration, or another process is using it."""


class CannotStackError(ConfigurationError):
    """A learner's clients cannot train as one program and end as they would alone; the message is the reason."""


class MissingExtraError(ConfigurationError, ImportError):
    """An optional package is not installed.

    Args:
        package: The import name of the missing package.
        purpose: What it was wanted for, as it reads after "to".
        extra: The extra of shoal that brings it.
    """

    def __init__(self, package: str, *, purpose: str, extra: str) -> None:
        super().__init__(f"{package} is needed to {purpose} and is not installed: pip install 'shoal[{extra}]'")
        self.extra = extra


class ClientError(ShoalError, RuntimeError):
    """More clients of a round failed than the run allows; the first client's own exception is the cause."""


class WorkerError(ShoalError, RuntimeError):
    """Another worker of a distributed run failed or is gone; the message says which, a note holds its traceback."""


class SiteError(ShoalError, RuntimeError):
    """A site failed: the message says which, which of its ranks, and how; a note holds the last lines of its log."""


class EngineError(ShoalError, RuntimeError):
    """A process of the engine's own has ended or does not answer; the round cannot go on."""


class NonFiniteError(ShoalError, ArithmeticError):
    """The server step would have put NaN or infinity into the global model; the model was left as it was."""


class CheckpointError(ShoalError, RuntimeError):
    """No checkpoint of a run can be read."""


class StorageError(ShoalError, RuntimeError):
    """A file of the run could not be written; the files written before it are whole."""


class RunInterrupted(KeyboardInterrupt):
    """A run was stopped from outside after its state was saved.

    Args:
        message: What happened and how to go on, in one line.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM came: it ends a run as Ctrl-C does, with its state saved."""


def by_sigterm(interrupt: BaseException) -> bool:
    """Tells whether an interruption, or what it was made of, came by SIGTERM."""
    return isinstance(interrupt, Terminated) or isinstance(interrupt.__cause__, Terminated)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigurationError:
    """Returns the error for a name that does not exist, with the nearest ones that do.

    Args:
        kind: What the name was meant to be, such as "algorithm".
        name: The name as it was given.
        known: The names that exist.
    """
    options = sorted(known)
    near = difflib.get_close_matches(name.lower(), options, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(option) for option in near)}?" if near else f"known: {', '.join(options)}"
    return ConfigurationError(f"unknown {kind} {name!r}; {hint}")
