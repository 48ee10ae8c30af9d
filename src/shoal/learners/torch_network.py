"""Which of a machine's network interfaces torch.distributed is to use."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIOCGIFADDR = 0x8915
"""The operating system's question for the address of a network interface."""

IPV6_ADDRESSES = Path("/proc/net/if_inet6")
"""Where the operating system lists its IPv6 addresses, each with its interface."""


def interface_of(address: str) -> str | None:
    """Returns the name of this machine's network interface that has an IP address; None where none has."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.version == 6:
        known = IPV6_ADDRESSES.read_text() if IPV6_ADDRESSES.exists() else ""
        lines = (line.split() for line in known.splitlines())
        return next((name for number, *_, name in lines if int(number, 16) == int(wanted)), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            question = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, question)
            except OSError:
                continue
            if answer[20:24] == wanted.packed:
                return name
    return None


@contextmanager
def gloo_over(interface: str | None) -> Iterator[None]:
    """Lets gloo use a network interface, unless the user has named one.

    By itself it takes the one that the machine's own name leads to, which often is none that others can reach.
    """
    name = "GLOO_SOCKET_IFNAME"
    if interface is None or name in os.environ:
        yield
        return
    os.environ[name] = interface
    try:
        yield
    finally:
        del os.environ[name]


def interface_towards(host: str, port: int) -> str | None:
    """Returns the network interface through which this machine reaches another; None where it is not known."""
    try:
        own = address_towards(host, port)
    except OSError:
        return None
    return interface_of(own)


def address_towards(host: str, port: int) -> str:
    """Returns this machine's IP address as another sees it.

    Raises:
        OSError: There is no way to that host.
    """
    kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: the system only looks up the way
        own: str = probe.getsockname()[0]
    return own
