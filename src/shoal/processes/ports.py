"""Free ports of this machine, kept until those that were told of them have done their work."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Yields ports that nobody else is given until the context ends.

    They are bound and not listened at, so whoever asks the system for a port that others may share (SO_REUSEPORT) can
    listen there meanwhile, and nobody else can.

    Raises:
        OSError: There are not so many.
    """
    with contextlib.ExitStack() as held:
        sockets = []
        for _ in range(count):
            sockets.append(held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sockets[-1].bind(("", 0))
        yield [one.getsockname()[1] for one in sockets]
