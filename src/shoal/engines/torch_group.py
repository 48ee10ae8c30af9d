"""Sums over the workers of one run, through torch.distributed."""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # no stub says they are public

from shoal.devices import Launched
from shoal.engines.control import SILENCE
from shoal.errors import ConfigurationError, WorkerError
from shoal.learners.torch_network import gloo_over
from shoal.processes.rest import rest_at_exit
from shoal.types import Array

CONNECT = 5.0
"""Seconds that torch waits for one step of another worker while they join, five of them at most. No signal ends it."""

STALL = 20.0
"""Seconds without progress after which torch gives a transfer up. Until then a process with one cannot end."""

CLOSED = 2.0
"""Seconds in which a worker's end shows after torch has seen its closed connection."""

PIECE = 1 << 26
"""Bytes that are copied at a time: torch sees no progress within one copy."""


def meeting_place(place: Launched, deadline: float) -> Store:
    """Returns the store through which the workers of a launcher such as torchrun find each other.

    Args:
        place: This worker's.
        deadline: On the clock of ``time.monotonic``.

    Raises:
        WorkerError: It cannot be reached in time.
        ConfigurationError: torch was built without torch.distributed.
    """
    if not dist.is_available():
        raise ConfigurationError(f"torch {torch.__version__} was built without torch.distributed: use another build")
    host, port = place.address, place.port
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun itself does
    if not keeps:
        _wait_for(host, port, deadline)
    try:
        store = TCPStore(
            host,
            port,
            is_master=keeps,
            timeout=datetime.timedelta(seconds=STALL),
            wait_for_workers=False,
            multi_tenant=keeps,
        )
    except RuntimeError as error:
        raise WorkerError(f"the workers cannot meet at {host}:{port}: {error}") from error
    # The store of torchrun outlives workers that it starts again, and so does what was told in it.
    return PrefixStore(f"shoal-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def told_in(store: Store, key: str, deadline: float) -> str:
    """Waits until something is told in a store, and returns it.

    Raises:
        WorkerError: The time is up, or the store is gone.
    """
    try:
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if store.check([key]):
            return str(store.get(key), "utf-8")
    except RuntimeError as error:
        raise WorkerError(f"the place where the workers were to meet is gone: {error}") from error
    raise WorkerError("worker 0 did not come in time: do all workers run the same command?")


class TorchGroup:
    """All workers, joined for sums.

    Args:
        store: From :func:`meeting_place`; all workers come here at the same time.
        rank: Which worker this is.
        count: How many there are.
        interface: The network interface towards the others, where it is known.
        watch: Raises if a worker is gone; called while waiting.

    Raises:
        WorkerError: They cannot be joined.
    """

    def __init__(
        self, store: Store, rank: int, count: int, *, interface: str | None, watch: Callable[[], None]
    ) -> None:
        rest_at_exit()
        self._watch = watch
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        timeout = datetime.timedelta(seconds=CONNECT)
        with self._explained(CLOSED), gloo_over(interface):
            if dist.is_initialized():  # the user's script has a group of its own, for purposes of its own
                self._group: Any = dist.new_group(backend=backend, timeout=timeout)
            else:
                dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
                self._group = dist.group.WORLD
        self._group.set_timeout(datetime.timedelta(seconds=STALL))

    def add_up(self, arrays: Sequence[Array], extra: Sequence[float]) -> list[float]:
        """Replaces arrays, in place, and numbers by their sums over the workers: one all-reduce of one flat tensor.

        Args:
            arrays: Float64, of the same shapes in the same order on every worker; numpy's, or torch's on one device.
            extra: Further numbers, as many on every worker.

        Returns:
            The sums of the further numbers.

        Raises:
            WorkerError: The sum failed.
        """
        pieces = [torch.as_tensor(array).reshape(-1) for array in arrays]
        numbers = torch.tensor(extra, dtype=torch.float64)
        flat = torch.cat([*pieces, numbers.to(pieces[0].device) if pieces else numbers])
        self._finish(partial(dist.all_reduce, flat, group=self._group, async_op=True))
        *sums, numbers = torch.split(flat, [*map(len, pieces), len(extra)])
        _write(arrays, sums)
        return numbers.tolist()

    def copy_from_leader(self, arrays: Sequence[Array]) -> None:
        """Overwrites arrays, in place, with those of worker 0, bit for bit.

        Args:
            arrays: Of the same shapes and dtypes in the same order on every worker.

        Raises:
            WorkerError: The transfer failed.
        """
        pieces = [torch.as_tensor(array).reshape(-1).view(torch.uint8) for array in arrays]
        flat = torch.cat(pieces)
        for piece in torch.split(flat, PIECE):
            self._finish(partial(dist.broadcast, piece, 0, group=self._group, async_op=True))
        _write(arrays, torch.split(flat, [*map(len, pieces)]))

    def leave(self) -> None:
        """Parts from the other workers; waits for what was under way, at most for :data:`STALL` seconds."""
        if dist.is_initialized():  # the user's script may have ended all groups before
            dist.destroy_process_group(self._group)

    def _finish(self, start: Callable[[], Any]) -> None:
        """Makes a transfer, in a way that signals and the death of a worker can end."""
        with self._explained():
            work = start()
        began = looked = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            if now - looked > 0.2:
                self._watch()
                looked = now
            time.sleep(0.00005 if now - began < 0.01 else 0.001)
        with self._explained():
            work.wait()

    @contextmanager
    def _explained(self, seconds: float = SILENCE) -> Iterator[None]:
        """Raises what ended a transfer: a worker's end, which may show only so much later than torch gives up."""
        try:
            yield
        except RuntimeError as error:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                self._watch()
                time.sleep(0.05)
            raise WorkerError(f"the workers cannot reach each other: {error}") from error


def _wait_for(host: str, port: int, deadline: float) -> None:
    """Waits until somebody listens, in a way that signals can end."""
    while True:
        try:
            socket.create_connection((host, port), timeout=2.0).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"the workers were to meet at {host}:{port}, and it cannot be reached: {error}"
                ) from error
            time.sleep(0.1)
        else:
            return


def _write(arrays: Sequence[Array], flat: Sequence[torch.Tensor]) -> None:
    """Writes pieces of a flat tensor into the arrays they came from, whatever the order of these in memory."""
    for array, piece in zip(arrays, flat, strict=True):
        own = torch.as_tensor(array)
        if piece.dtype != own.dtype:
            piece = piece.clone().view(own.dtype)  # noqa: PLW2901 - a copy lies where any dtype may
        own.copy_(piece.reshape(own.shape))
