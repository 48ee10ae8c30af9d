"""Messages between processes: a small JSON object and at most one file descriptor, over a Unix socket.

The socket keeps messages apart (``SOCK_SEQPACKET``): each comes whole or not at all. Whatever is large lies in shared
memory, and its file descriptor goes along.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from typing import Any

LIMIT = 2**16
"""The most bytes of a message."""

Message = dict[str, Any]


def channel() -> tuple[socket.socket, socket.socket]:
    """Returns the two ends of a new channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(end: socket.socket, message: Mapping[str, Any], fd: int | None = None) -> None:
    """Sends a message; the caller keeps its own file descriptor.

    Raises:
        ValueError: The message is longer than :data:`LIMIT`.
        OSError: The other end is closed; or the socket's time-out has passed.
    """
    data = json.dumps(message).encode()
    if len(data) > LIMIT:
        raise ValueError(f"a message of {len(data)} bytes is longer than {LIMIT}")
    if fd is None:
        end.send(data)
    else:
        socket.send_fds(end, [data], [fd])


def receive(end: socket.socket) -> tuple[Message, int | None] | None:
    """Waits for a message.

    Returns:
        The message and its file descriptor, which is the caller's to close; None where the other end is closed.

    Raises:
        ValueError: It is no message, or was cut.
        OSError: The socket's time-out has passed.
    """
    try:
        data, fds, flags, _ = socket.recv_fds(end, LIMIT, 1)
    except ConnectionResetError:  # told once, where the other end was closed before it had read everything
        return receive(end)
    if not data:
        return None
    for fd in fds:
        os.set_inheritable(fd, False)  # recv_fds takes flags, and in some versions of Python forgets them
    try:
        return _decoded(data, cut=bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))), fds[0] if fds else None
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise


def _decoded(data: bytes, *, cut: bool) -> Message:
    if cut:
        raise ValueError(f"a message is longer than {LIMIT} bytes, or too many files are open to receive its own")
    try:
        message = json.loads(data)
    except RecursionError as error:
        raise ValueError("a message is nested too deeply") from error
    if type(message) is not dict:
        raise ValueError(f"a message must be a JSON object, not {message!r:.40}")
    return message
