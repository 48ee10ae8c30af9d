"""Sums over the workers of one run, through torch.distributed."""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from shoal.errors import ConfigurationError, WorkerError
from shoal.types import Array

SIOCGIFADDR = 0x8915
"""The operating system's question for the address of a network interface."""

TRANSFER = datetime.timedelta(minutes=30)
"""After so long a sum over the workers is given up, although all of them are alive."""


def join(deadline: float) -> None:
    """Joins the workers that a launcher such as torchrun has started, unless this process has joined already.

    Args:
        deadline: On the clock of ``time.monotonic``.

    Raises:
        WorkerError: The others did not come in time.
        ConfigurationError: torch was built without torch.distributed.
    """
    if not dist.is_available():
        raise ConfigurationError(f"torch {torch.__version__} was built without torch.distributed: use another build")
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    failure: list[Exception] = []

    def connect() -> None:
        try:
            dist.init_process_group(backend, timeout=TRANSFER)
        except Exception as error:
            failure.append(error)  # for the thread that waits

    with _interface():
        # In a thread, because torch waits for the others where no signal and no deadline of ours reaches it.
        joining = threading.Thread(target=connect, name="shoal-join", daemon=True)
        joining.start()
        while joining.is_alive() and time.monotonic() < deadline:
            joining.join(0.2)
    if joining.is_alive():
        raise WorkerError(
            f"{os.environ['WORLD_SIZE']} workers were to meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}, and not all have come: start the others too, and let them reach that port"
        )
    if failure:
        raise WorkerError(f"the workers cannot join: {failure[0]}") from failure[0]


def add_up(arrays: Sequence[Array], extra: Sequence[float], watch: Callable[[], None]) -> list[float]:
    """Replaces arrays, in place, and numbers by their sums over the workers: one all-reduce of one flat tensor.

    Args:
        arrays: Float64, of the same shapes in the same order on every worker; numpy's, or torch's on one device.
        extra: Further numbers, as many on every worker.
        watch: Raises if a worker is gone; called while waiting.

    Returns:
        The sums of the further numbers.

    Raises:
        WorkerError: The sum failed.
    """
    pieces = [torch.as_tensor(array).reshape(-1) for array in arrays]
    numbers = torch.tensor(extra, dtype=torch.float64)
    flat = torch.cat([*pieces, numbers.to(pieces[0].device) if pieces else numbers])
    _finish(dist.all_reduce(flat, async_op=True), watch)
    *sums, numbers = torch.split(flat, [*map(len, pieces), len(extra)])
    _write(arrays, sums)
    return numbers.tolist()


def copy_from_leader(arrays: Sequence[Array], watch: Callable[[], None]) -> None:
    """Overwrites arrays, in place, with those of worker 0, bit for bit.

    Args:
        arrays: Of the same shapes and dtypes in the same order on every worker.
        watch: Raises if a worker is gone; called while waiting.

    Raises:
        WorkerError: The transfer failed.
    """
    pieces = [torch.as_tensor(array).reshape(-1).view(torch.uint8) for array in arrays]
    flat = torch.cat(pieces)
    _finish(dist.broadcast(flat, 0, async_op=True), watch)
    _write(arrays, torch.split(flat, [*map(len, pieces)]))


def _write(arrays: Sequence[Array], flat: Sequence[torch.Tensor]) -> None:
    """Writes pieces of a flat tensor into the arrays they came from, whatever the order of these in memory."""
    for array, piece in zip(arrays, flat, strict=True):
        own = torch.as_tensor(array)
        if piece.dtype != own.dtype:
            piece = piece.clone().view(own.dtype)  # noqa: PLW2901 - a copy lies where any dtype may
        own.copy_(piece.reshape(own.shape))


def _finish(work: Any, watch: Callable[[], None]) -> None:
    """Waits for a transfer, in a way that signals and the death of a worker can end."""
    began = looked = time.monotonic()
    while not work.is_completed():
        now = time.monotonic()
        if now - looked > 0.2:
            watch()
            looked = now
        time.sleep(0 if now - began < 0.01 else 0.001)
    try:
        work.wait()
    except RuntimeError as error:
        _explain(error, watch)


def _explain(error: RuntimeError, watch: Callable[[], None]) -> None:
    """Raises what ended a transfer: a worker's end, which may show a moment later than its closed connection."""
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        watch()
        time.sleep(0.05)
    raise WorkerError(f"the sum over the workers failed: {error}") from error


def leave() -> None:
    """Parts from the other workers."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _interface() -> Iterator[None]:
    """Lets gloo use the interface over which the leader is reached, unless the user has named one.

    By itself it takes the one that the machine's own name leads to, which often is none that others can reach.
    """
    name = "GLOO_SOCKET_IFNAME"
    found = None if name in os.environ else _interface_towards(os.environ["MASTER_ADDR"])
    if found is None:
        yield
        return
    os.environ[name] = found
    try:
        yield
    finally:
        del os.environ[name]


def _interface_towards(host: str) -> str | None:
    """Returns the name of the network interface over which an IPv4 host is reached; None where that is not known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
        if own.startswith("127."):
            alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
            return "lo" if alone else None
        for _, name in socket.if_nameindex():
            question = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, question)
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None
