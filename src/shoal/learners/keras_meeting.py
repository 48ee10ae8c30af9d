"""Where TensorFlow's workers meet before TensorFlow does, which would wait for ever, and hear nothing meanwhile."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence

from shoal.errors import WorkerError

MEETING = 300.0
"""Seconds in which all workers must have come."""

GO = b"go"

LOOK = 0.2

INTRODUCTION = 5.0
"""Seconds in which whoever connects must say which worker it is."""


def meet(workers: Sequence[str], index: int, *, shared: bool, within: float = MEETING) -> None:
    """Waits until all workers are there, at the first one's address, which is free again afterwards.

    Args:
        workers: The addresses of all, ``host:port``.
        index: Which one this is.
        shared: Whether somebody holds the ports, with whom they are to be shared.
        within: Seconds.

    Raises:
        WorkerError: Some worker did not come in time, or this one cannot listen at its address.
    """
    until = time.monotonic() + within
    if len(workers) == 1:
        return
    with _server(workers[index], index, shared=shared) as server:
        if index == 0:
            _await_all(server, workers, until, within)
    if index:
        _join(workers[0], index, until, within)


def _await_all(server: socket.socket, workers: Sequence[str], until: float, within: float) -> None:
    came: dict[int, socket.socket] = {}
    server.settimeout(LOOK)
    with contextlib.ExitStack() as opened:
        while len(came) < len(workers) - 1:
            if time.monotonic() > until:
                missing = ", ".join(workers[one] for one in range(1, len(workers)) if one not in came)
                raise WorkerError(f"of {len(workers)} workers {missing} did not come within {within:g} s")
            with contextlib.suppress(TimeoutError):
                index, stream = _introduced(server.accept()[0])
                if 0 < index < len(workers):
                    came[index] = opened.enter_context(stream)
                else:
                    stream.close()
        for stream in came.values():
            with contextlib.suppress(OSError):
                stream.sendall(GO)


def _introduced(stream: socket.socket) -> tuple[int, socket.socket]:
    """Returns which worker has connected, and the connection; -1 where it is none."""
    stream.settimeout(INTRODUCTION)
    try:
        return int(stream.recv(16)), stream
    except (OSError, ValueError):
        return -1, stream


def _server(address: str, index: int, *, shared: bool) -> socket.socket:
    """Returns a socket that listens at a worker's port, for IPv4 and IPv6 where there is such."""
    _, port = _place(address)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, reuse_port=shared, dualstack_ipv6=both)
    except OSError as error:
        raise WorkerError(f"worker {index} cannot listen at {address}: {error}; name another port") from error


def _join(address: str, index: int, until: float, within: float) -> None:
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection(_place(address), timeout=min(left, 5.0)) as stream:
            stream.sendall(str(index).encode())
            stream.settimeout(LOOK)
            while time.monotonic() < until:
                with contextlib.suppress(TimeoutError):
                    if stream.recv(len(GO)) == GO:
                        return
                    break  # it is gone, and may come again
        time.sleep(LOOK)
    raise WorkerError(f"worker 0 did not answer at {address} within {within:g} s, and worker {index} gives up")


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
