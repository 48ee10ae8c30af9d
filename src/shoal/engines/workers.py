"""The workers that a launcher such as torchrun started: how they meet, agree, and tell each other of their end."""

from __future__ import annotations

import atexit
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from shoal import trees
from shoal.description import differences
from shoal.engines.control import PASSWORD, Control, Message, Reception, call_on
from shoal.errors import ConfigurationError, WorkerError
from shoal.types import Array

JOIN = 300.0
"""Seconds in which all workers must have come."""

LEAVE = 10.0
"""Seconds that the leader waits at the end for the others to close their connections."""

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in the environment of each worker."""


def launched_workers() -> int:
    """Returns how many workers a launcher has started, this process among them; 0 where none has."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else 0


def restarted() -> bool:
    """Tells whether the launcher has started the workers anew, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class Workers:
    """All workers, as one of them sees them. Worker 0 leads: it decides when a round begins, and speaks and stores.

    Use :meth:`join`. As a context it tells the others of whatever ends this worker's part.

    Args:
        rank: Which worker this is.
        count: How many there are.
        control: The connections with the others; None for a worker alone.
    """

    def __init__(self, rank: int, count: int, control: Control | None) -> None:
        self.rank = rank
        self.count = count
        self.told = False
        """Whether the others know of this worker's end."""
        self._control = control
        self._watched = 0.0

    @classmethod
    def join(cls) -> Workers:
        """Meets the other workers, once in a process; without a launcher there is one worker, this one.

        Raises:
            WorkerError: Not all have come within :data:`JOIN` seconds, or they have parted after an error.
        """
        if not launched_workers():
            return cls(0, 1, None)
        if not _here:
            _here.append(_meet(time.monotonic() + JOIN))
            atexit.register(_here[0].leave)
        if _here[0].told:
            raise WorkerError("the workers have parted after an error: start them again")
        return _here[0]

    @property
    def leads(self) -> bool:
        """Whether this is worker 0."""
        return self.rank == 0

    def agree(self, facts: Mapping[str, Any], device: str) -> None:
        """Makes sure that the workers are about to do the same.

        Args:
            facts: What must be equal, as JSON.
            device: Where this worker's model is; no two may share one of a machine's CUDA devices.

        Raises:
            ConfigurationError: They are not; on the leader.
            WorkerError: They are not; on the others.
        """
        own = {"facts": dict(facts), "device": device, "host": socket.gethostname(), "rank": self.rank}
        others = self.gather("about", own)
        if self.leads and (wrong := _disagreement([json.loads(json.dumps(own)), *others])):
            raise ConfigurationError(wrong)
        self.from_leader("agreed", True)

    def gather(self, kind: str, content: Any) -> list[Any]:
        """Returns on the leader what every other worker gives here, as JSON in the order of the ranks; else nothing.

        Raises:
            WorkerError: A worker failed or is gone.
            KeyboardInterrupt: One was interrupted.
        """
        if self._control is None:
            return []
        if self.leads:
            return list(self._control.gather(kind).values())
        self._control.tell({kind: content})
        return []

    def from_leader(self, kind: str, content: Any = None) -> Any:
        """Returns on every worker what the leader gives here, as JSON; :meth:`gather` says what is raised."""
        if self._control is None:
            return content
        if self.leads:
            self._control.tell({kind: content})
            return content
        return self._control.gather(kind)[0]

    def add_up(self, arrays: Sequence[Array], numbers: Sequence[float]) -> list[float]:
        """Replaces float64 arrays, in place, by their sums over the workers; returns the sums of the numbers.

        All workers must have come to this point; :meth:`gather` says what is raised.
        """
        if self._control is None:
            return list(numbers)
        from shoal.engines.torch_group import add_up

        return add_up(arrays, numbers, self._control.watch)

    def copy_leader(self, tree: Mapping[str, Array]) -> dict[str, Array]:
        """Returns a tree with the leader's numbers, bit for bit; names, shapes and dtypes are everywhere the same."""
        copied = trees.copy(tree)
        if self._control is not None and copied:
            from shoal.engines.torch_group import copy_from_leader

            copy_from_leader([copied[name] for name in sorted(copied)], self._control.watch)
        return copied

    def watch(self) -> None:
        """Looks whether all workers are alive, at most once a second; :meth:`gather` says what is raised."""
        now = time.monotonic()
        if self._control is not None and now - self._watched > 1.0:
            self._watched = now
            self._control.watch()

    def leave(self) -> None:
        """Ends the connections with the others, who should have come to their end too."""
        if self._control is None:
            return
        from shoal.engines.torch_group import leave

        if self.leads and not self.told:
            self._control.wait_for_all_to_leave(LEAVE)
        self._control.close()
        self._control = None
        leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self._control is not None and not self.told:
            self.told = self._control.try_to_tell({"ended": _account(error, leader=self.leads)})


_here: list[Workers] = []
"""This process among the others, once it has joined them."""


def _meet(deadline: float) -> Workers:
    """Connects the leader with the others, over a port and with a password that it tells through the joined group."""
    from shoal.engines.torch_group import copy_from_leader, join

    def hurry() -> None:
        if time.monotonic() > deadline:
            raise WorkerError(f"the workers did not meet within {JOIN:.0f} seconds")

    join(deadline)
    rank, count, host = int(os.environ["RANK"]), launched_workers(), os.environ["MASTER_ADDR"]
    where = np.zeros(2 + PASSWORD, dtype=np.uint8)
    if rank != 0:
        copy_from_leader([where], hurry)
        port, password = int.from_bytes(where[:2].tobytes(), "big"), where[2:].tobytes().decode()
        return Workers(rank, count, call_on(host, port, password, rank, deadline))
    with Reception(host, count - 1) as reception:
        where[:] = np.frombuffer(reception.port.to_bytes(2, "big") + reception.password.encode(), dtype=np.uint8)
        copy_from_leader([where], hurry)
        return Workers(rank, count, reception.receive(deadline))


def _account(error: BaseException, *, leader: bool) -> Message:
    """Returns what the others are told of an exception."""
    from traceback import format_exception

    return {
        "error": f"{type(error).__name__}: {error}",
        "traceback": "" if isinstance(error, ConfigurationError) else "".join(format_exception(error)),
        "interrupted": isinstance(error, KeyboardInterrupt),
        "leader": leader,
    }


def _disagreement(every: Sequence[Message]) -> str | None:
    """Says in what workers differ who should not, or what they share that they cannot; None if all is well."""
    leader, taken = every[0], dict[tuple[str, str], int]()
    for one in every:
        for key, value, other in differences(leader["facts"], one["facts"]):
            return (
                f"{key} is {value!r} on worker 0 and {other!r} on worker {one['rank']}: "
                "start all with the same command, data and versions"
            )
        place = (one["host"], one["device"])
        if place in taken and one["device"] != "cpu":
            return (
                f"workers {taken[place]} and {one['rank']} are both on {one['device']} of {one['host']}: "
                "start at most one worker for each GPU, or use --device cpu"
            )
        taken[place] = one["rank"]
    return None
