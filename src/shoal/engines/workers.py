"""The workers that a launcher such as torchrun started: how they meet, agree, and tell each other of their end."""

from __future__ import annotations

import atexit
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shoal import trees
from shoal.description import differences
from shoal.devices import Launched
from shoal.engines.accounts import told
from shoal.engines.control import SILENCE, Control, Message, is_loopback
from shoal.engines.reception import Reception, call_on, introduction
from shoal.errors import ConfigurationError, WorkerError
from shoal.types import Array

if TYPE_CHECKING:
    from shoal.engines.torch_group import TorchGroup

JOIN = 300.0
"""Seconds in which all workers must have come."""

LEAVE = 5.0
"""Seconds that the leader waits at the end for the others to close their connections."""

NEWS = 0.5
"""Seconds in which the end of another worker may show as the reason for a signal to this one."""


def launched_workers() -> int:
    """Returns how many workers a launcher has started, this process among them; 0 where none has."""
    place = Launched.here()
    return place.count if place else 0


def restarted() -> bool:
    """Tells whether the launcher has started the workers anew, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class Workers:
    """All workers, as one of them sees them. Worker 0 leads: it decides when a round begins, and speaks and stores.

    Use :meth:`join`. As a context it tells the others of whatever ends this worker's part, and raises what ends
    theirs, wherever this one is.

    Args:
        place: This worker's among those that a launcher has started; None for one alone.
    """

    def __init__(self, place: Launched | None = None) -> None:
        self._place = place or Launched.alone()
        self.rank = self._place.rank
        self.count = self._place.count
        self.speaks = self.leads
        """Whether it is this worker that tells the user of an error: the leader, or another if that cannot."""
        self._ended = False
        self._control: Control | None = None
        self._store: Any = None
        self._group: TorchGroup | None = None

    @classmethod
    def join(cls) -> Workers:
        """Meets the other workers, once in a process; without a launcher there is one worker, this one.

        Raises:
            WorkerError: Not all have come within :data:`JOIN` seconds, or they have parted after an error.
        """
        if not launched_workers():
            return cls()
        workers = cls.here()
        if workers._ended:  # noqa: SLF001 - its own
            raise WorkerError("the workers have parted after an error: start them again")
        if workers._control is None:  # noqa: SLF001
            atexit.register(workers.leave)
            workers._meet(time.monotonic() + JOIN)  # noqa: SLF001
        return workers

    @classmethod
    def here(cls) -> Workers:
        """Returns this process among the workers that a launcher has started, whether or not it has met them."""
        if not _here:
            _here.append(cls(Launched.here()))
        return _here[0]

    @property
    def leads(self) -> bool:
        """Whether this is worker 0."""
        return self.rank == 0

    def connect(self) -> None:
        """Joins the workers for sums, once in a process; all come here at the same time.

        Raises:
            WorkerError: They cannot reach each other; :meth:`gather` says what else.
        """
        if self._control is None or self._group is not None:
            return
        from shoal.engines.torch_group import TorchGroup
        from shoal.learners.torch_network import interface_of

        own = self._control.address()
        self.gather("ready", True)
        everywhere = self.from_leader("address", own)
        # The loopback interface leads to no other machine: who meets the leader over it uses that one's interface.
        interface = interface_of(everywhere if is_loopback(own) else own)
        self._group = TorchGroup(self._store, self.rank, self.count, interface=interface, watch=self._control.watch)

    def agree(self, facts: Mapping[str, Any], device: str) -> None:
        """Makes sure that the workers are about to do the same.

        Args:
            facts: What must be equal, as JSON.
            device: Where this worker's model is; no two may share one of a machine's CUDA devices.

        Raises:
            ConfigurationError: They are not.
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
            ConfigurationError: One cannot do what was asked for.
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
            self._control.watch()
            self._control.tell({kind: content})
            return content
        return self._control.gather(kind)[0]

    def add_up(self, arrays: Sequence[Array], numbers: Sequence[float]) -> list[float]:
        """Replaces float64 arrays, in place, by their sums over the workers; returns the sums of the numbers.

        All workers must have come to this point; :meth:`gather` says what is raised.
        """
        return list(numbers) if self._group is None else self._group.add_up(arrays, numbers)

    def copy_leader(self, tree: Mapping[str, Array]) -> dict[str, Array]:
        """Returns a tree with the leader's numbers, bit for bit; names, shapes and dtypes are everywhere the same."""
        copied = trees.copy(tree)
        if self._group is not None and copied:
            self._group.copy_from_leader([copied[name] for name in sorted(copied)])
        return copied

    def watch(self) -> None:
        """Looks whether all workers are alive; :meth:`gather` says what is raised."""
        if self._control is not None:
            self._control.watch()

    def part(self) -> None:
        """Lets the workers go their own ways, once all have what they need of each other: an end ends them no more."""
        self.from_leader("parted", True)
        if self._control is not None:
            self._control.disarm()

    def leave(self) -> None:
        """Ends the connections with the others, who should have come to their end too."""
        if self._control is None:
            return
        if self.leads:
            self._control.wait_for_all_to_leave(LEAVE)
        self._control.close()
        self._control = None
        if self._group is not None:
            self._group.leave()
            self._group = None

    def __enter__(self) -> Self:
        if self._control is not None:
            self._control.arm()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._control is None:
            return
        self._control.disarm()
        if error is None or self._ended:
            return
        cause = self._end(self._control, error)
        if cause is not error:
            raise cause from error

    def _end(self, control: Control, error: BaseException) -> BaseException:
        """Tells the others of what ends this worker's part; returns the cause, which may be the end of another."""
        self._ended = True
        cause = control.cause(error, NEWS)
        control.tell({"ended": told(cause)})
        if not self.leads:
            # The leader, once it has saved its state, tells everybody of the end, and then it tells the user too.
            control.wait_for_an_end(SILENCE)
            self.speaks = control.told_by is None and (cause is not control.end or self._is_first_here())
        return cause

    def _is_first_here(self) -> bool:
        """Tells whether this is the first worker of its machine beside the leader."""
        local = self._place.local_rank
        return local == (1 if local == self.rank else 0)

    def _meet(self, deadline: float) -> None:
        """Connects the leader with the others, over a port and with a password that it tells in a store."""
        from shoal.engines.torch_group import meeting_place, told_in

        try:
            self._store = meeting_place(self._place, deadline)
            if not self.leads:
                where = json.loads(told_in(self._store, "reception", deadline))
                self._control = call_on(where, self._place.address, self.rank, deadline)
                return
            self._control = Control()
            with self, Reception(self._place.address, self.count - 1) as reception:
                where = {"port": reception.port, "password": reception.password, **introduction()}
                self._store.set("reception", json.dumps(where))
                reception.receive(self._control, deadline)
        except BaseException as error:
            self._ended = True
            self.speaks = self.leads or (isinstance(error, Exception) and self._is_first_here())
            raise


_here: list[Workers] = []
"""This process among the others: one, or none yet."""


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
