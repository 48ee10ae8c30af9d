"""Free ports of this machine."""

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


def free_ports(count: int) -> list[int]:
    """Returns ports of loopback that nobody listens at now, for processes that cannot be handed a socket.

    Another process may get there first; then theirs ends, and says so.
    """
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
