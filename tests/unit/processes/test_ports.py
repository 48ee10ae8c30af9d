"""Ports that are held, and handlers that are kept."""

from __future__ import annotations

import ctypes
import signal
import socket

import pytest

from shoal.processes.handlers import handler_kept
from shoal.processes.ports import held_ports


def test_nobody_else_gets_a_held_port():
    with held_ports(3) as ports, held_ports(3) as others:
        assert len({*ports, *others}) == 6
        for port in ports:
            with pytest.raises(OSError, match="in use"):
                socket.create_server(("127.0.0.1", port))
    socket.create_server(("127.0.0.1", ports[0])).close()


def test_whoever_shares_a_held_port_can_listen_there():
    with (
        held_ports(1) as [port],
        socket.create_server(("127.0.0.1", port), reuse_port=True) as server,
        socket.create_connection(("127.0.0.1", port), timeout=5) as stream,
    ):
        stream.sendall(b"here")
        server.settimeout(5)
        with server.accept()[0] as accepted:
            assert accepted.recv(4) == b"here"


@pytest.mark.parametrize("own", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: heard.append(1)])
def test_a_handler_is_what_it_was(own):
    before = signal.signal(signal.SIGUSR1, own)
    heard.clear()
    try:
        with handler_kept(signal.SIGUSR1):
            ctypes.CDLL(None).signal(int(signal.SIGUSR1), ctypes.c_void_p(1))  # as a library in C would: ignore it
            signal.raise_signal(signal.SIGUSR1)
        if own is not signal.SIG_DFL:  # which would end the process
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == ([1] if callable(own) and not isinstance(own, signal.Handlers) else [])


heard: list[int] = []
