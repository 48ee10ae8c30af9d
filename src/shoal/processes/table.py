"""The process table: whether a process lives, works or is stopped, and which ones belong together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

PROCESSES = Path("/proc")


@dataclass(frozen=True)
class Standing:
    """How a process stands at a moment."""

    state: str
    """One letter, as the system tells: R runs, S and D wait, T is stopped, Z has ended."""
    ticks: int
    """The processor time that all of its threads have had, in ticks of the system's clock."""


def standing(pid: int) -> Standing | None:
    """Returns how a process stands; None where there is none."""
    try:
        text = (PROCESSES / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # its name, in parentheses, may have spaces
    return Standing(fields[0], int(fields[11]) + int(fields[12]))


def credentials(stream: socket.socket) -> tuple[int, int]:
    """Returns the process and the user at the other end of a Unix socket, as the system knows them."""
    raw = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", raw)
    return pid, user


def handle(pid: int) -> int | None:
    """Returns a file descriptor that means this process even when another has got its number; None where it is gone."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def kill(process: int) -> None:
    """Ends a process by its :func:`handle`, at once; without effect where it has ended."""
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(process, signal.SIGKILL)


def marked(variable: str, value: str) -> list[int]:
    """Returns this user's processes that were started with an environment variable of this value, but for this one."""
    mark = f"{variable}={value}".encode()
    found = []
    for entry in PROCESSES.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it is gone, or another user's
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def in_sessions(sessions: Collection[int]) -> list[int]:
    """Returns the processes that belong to some sessions and have not ended.

    Args:
        sessions: The numbers of the processes that began them, whose ends nobody has yet waited for: or the numbers
            might be others' by now.
    """
    found = []
    for entry in PROCESSES.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it is gone
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) in sessions and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found
