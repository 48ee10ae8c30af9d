"""The ranks of a command, started and watched by torch's elastic launcher."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.devices import THREADS, cores_each
from shoal.errors import Terminated, WorkerError
from shoal.learners.torch_worker_ports import told_of_workers

MEETING = 300
"""Seconds in which all nodes must have come."""

SHUTDOWN = 10
"""Seconds that the other ranks have to end after one has failed, before they are killed."""

LINES = 20
"""How many of a failed rank's last lines are shown."""

ENDED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of a rank that the launcher has ended."""

LOST = "another rank is gone"
"""What a rank says that fails because another did."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Several machines that run the same command together."""

    count: int
    """How many machines."""
    rank: int
    """Which one this is; 0 is where they meet."""
    rendezvous: str
    """``host:port`` on machine 0."""


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """A rank that ended as it should not."""

    rank: int
    """Which one, over all machines."""
    pid: int
    """Its process."""
    code: int
    """Its exit code; negative: the signal that ended it."""
    lines: tuple[str, ...]
    """The last lines that it wrote to standard error."""
    unheard: tuple[str, ...] = ()
    """Those of them that rank 0, which is heard at once, has not written too."""

    @property
    def by_others(self) -> bool:
        """Whether it ended because another rank did."""
        return self.code in ENDED or any(LOST in line for line in self.lines)

    def __str__(self) -> str:
        how = f"ended with exit code {self.code}"
        if self.code < 0:
            how = f"was ended by {signal.Signals(-self.code).name}"
        return f"rank {self.rank} (process {self.pid}) {how}"


class RanksFailedError(WorkerError):
    """A rank failed, and the others were ended.

    Args:
        failure: The first cause, as far as it can be told.
    """

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def launch_ranks(
    body: Sequence[str] | Callable[[], None],
    *,
    processes: int,
    nodes: Nodes | None = None,
    all_heard: bool = False,
    within: Path | None = None,
    of_tensorflow: bool = False,
) -> None:
    """Runs a command, or a function, in several ranks, and waits until all of them have ended.

    Rank 0 has this process's standard output. What the ranks write to standard error is kept; that of rank 0 is shown
    at once, that of the rank that failed in the error.

    Args:
        body: The program and its arguments; or what to call in processes that are forked from this one.
        processes: How many ranks on this machine.
        nodes: The machines, if there are several.
        all_heard: Whether to show all that any rank writes, to either stream, each line headed by its rank.
        within: A folder that will be removed even if this process is killed, for what the ranks write; None for the
            system's.
        of_tensorflow: Whether to tell the ranks where each of them listens, as TensorFlow's workers must know.

    Raises:
        RanksFailedError: A rank failed.
        WorkerError: The machines did not meet in time.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; all ranks have ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    with tempfile.TemporaryDirectory(prefix="shoal-ranks-", dir=within) as logs, _quiet(), _threads(processes):
        told = told_of_workers(processes, nodes, MEETING) if of_tensorflow else nullcontext()
        try:
            config = _config(processes, nodes, Path(logs), all_heard=all_heard)
            with told:
                if callable(body):
                    elastic_launch(config, body)()
                else:
                    elastic_launch(config, body[0])(*body[1:])
        except ChildFailedError as error:
            cause = _first_cause(error.failures, Path(logs), first=_has_leader(nodes))
            raise RanksFailedError(cause) from error
        except SignalException as error:
            ended = Terminated if error.sigval == signal.SIGTERM else KeyboardInterrupt
            raise ended("all ranks have ended") from error
        except (TimeoutError, RuntimeError) as error:
            where = f"{nodes.count} machines did not meet at {nodes.rendezvous}" if nodes else "the ranks did not start"
            raise WorkerError(f"{where} within {MEETING} seconds: {str(error).splitlines()[0]}") from error


def _has_leader(nodes: Nodes | None) -> bool:
    """Tells whether this machine has rank 0."""
    return nodes is None or nodes.rank == 0


def _config(processes: int, nodes: Nodes | None, logs: Path, *, all_heard: bool) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    first = _has_leader(nodes)
    kept = dict.fromkeys(range(processes), Std.ALL)
    shown = kept if all_heard else {0: Std.ERR} if first else Std.NONE
    if first and not all_heard:
        kept[0] = Std.ERR
    count = nodes.count if nodes else 1
    settings: dict[str, Any] = {
        "min_nodes": count,
        "max_nodes": count,
        "nproc_per_node": processes,
        "run_id": uuid.uuid4().hex if nodes is None else "shoal",  # the same on all machines
        "max_restarts": 0,
        "monitor_interval": 0.1,
        "start_method": "fork",
        "logs_specs": DefaultLogsSpecs(log_dir=str(logs), redirects=kept, tee=shown),
        "log_line_prefix_template": "rank ${rank}: ",
        "shutdown_timeout": SHUTDOWN,
    }
    if nodes is None:
        settings |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}  # a free port
    else:
        settings |= {
            "rdzv_backend": "static",
            "rdzv_endpoint": nodes.rendezvous,
            "rdzv_configs": {"rank": nodes.rank, "timeout": MEETING},
        }
    known = inspect.signature(LaunchConfig).parameters  # torch 2.11 has no shutdown_timeout
    return LaunchConfig(**{name: value for name, value in settings.items() if name in known})


def _first_cause(failures: Any, logs: Path, *, first: bool) -> RankFailure:
    """Returns the failure that the others follow from: a rank that was killed, else one that did not lose another.

    Args:
        failures: The launcher's, by rank.
        logs: Where the ranks' standard error is kept.
        first: Whether this machine has rank 0.
    """
    heard = _last_lines(logs, 0) if first else ()
    found = []
    for rank, failure in failures.items():
        lines = _last_lines(logs, failure.local_rank)
        unheard = tuple(line for line in lines if line not in heard)
        found.append(RankFailure(rank=rank, pid=failure.pid, code=failure.exitcode, lines=lines, unheard=unheard))
    return min(found, key=lambda failure: (failure.by_others, failure.code >= 0, failure.rank))


def _last_lines(logs: Path, local_rank: int) -> tuple[str, ...]:
    files = sorted(logs.glob(f"**/{local_rank}/stderr.log"))
    text = files[-1].read_text(encoding="utf-8", errors="replace") if files else ""
    return tuple(text.rstrip().splitlines()[-LINES:])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the launcher's own log from the terminal: what it would say is in the error."""
    import torch.distributed.elastic.agent.server.local_elastic_agent  # noqa: F401 - makes its loggers

    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """Divides the cores among the ranks, unless the user has said how many threads they may use."""
    unsaid = [name for name in THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(unsaid, str(cores_each(processes))))
    try:
        yield
    finally:
        for name in unsaid:
            del os.environ[name]
