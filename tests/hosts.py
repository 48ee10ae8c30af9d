"""Hosts for tests: network namespaces of this machine, joined by a link that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NEEDED = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make network namespaces"),
    pytest.mark.skipif(not shutil.which("ip"), reason="there is no ip command to make hosts with: install iproute2"),
]
"""The marks of tests that need hosts."""

LINK = "link0"
"""The interface of each host that leads to the other."""


@dataclass(frozen=True)
class Host:
    """A network namespace with one end of the link."""

    name: str
    address: str

    @property
    def processes(self):
        """The ids of what runs there."""
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def worker(self):
        """Returns the id of the one process there that a launcher has started."""
        (pid,) = (pid for pid in self.processes if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes())
        return pid

    def kill(self):
        """Ends all that runs there at once, so that nobody tells anybody."""
        for pid in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def switch(self, state):
        """Switches this end of the link, and so the link, ``up`` or ``down``; no connection ends by that."""
        ip("-n", self.name, "link", "set", LINK, state)


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=10).stdout


def why_not():
    """Returns why this machine makes no network namespaces or no links in them; nothing where it does."""
    name = f"shoal-{os.getpid()}-probe"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", "type", "veth")
        finally:
            ip("netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return error.stderr.strip()
    return ""


@contextlib.contextmanager
def lone_host(end):
    """Yields one host, and takes it down with all that runs there."""
    host = Host(f"shoal-{os.getpid()}-{end}", f"192.168.83.{end}")
    ip("netns", "add", host.name)
    try:
        yield host
    finally:
        host.kill()
        ip("netns", "delete", host.name)


@contextlib.contextmanager
def linked_hosts():
    """Yields two hosts that reach each other."""
    with lone_host(1) as one, lone_host(2) as two:
        ip("link", "add", LINK, "netns", one.name, "type", "veth", "peer", "name", LINK, "netns", two.name)
        for host in (one, two):
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", LINK)
            ip("-n", host.name, "link", "set", "lo", "up")
            host.switch("up")
        yield [one, two]


@contextlib.contextmanager
def star_of_hosts():
    """Yields a host, and two others that each have a link to it alone; a cut of theirs leaves the other one's."""
    with lone_host(9) as middle, lone_host(1) as one, lone_host(2) as two:
        ip("-n", middle.name, "link", "set", "lo", "up")
        for number, host in enumerate((one, two), start=84):
            end = f"link{number}"
            ip("link", "add", LINK, "netns", host.name, "type", "veth", "peer", "name", end, "netns", middle.name)
            ip("-n", host.name, "address", "add", f"192.168.{number}.1/24", "dev", LINK)
            ip("-n", middle.name, "address", "add", f"192.168.{number}.9/24", "dev", end)
            ip("-n", middle.name, "link", "set", end, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
            host.switch("up")
        yield middle, [(one, "192.168.84.9"), (two, "192.168.85.9")]
