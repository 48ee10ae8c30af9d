from __future__ import annotations

import os
import socket
import stat

import pytest

from process_table import open_files
from shoal.errors import ConfigurationError
from shoal.sites.address import FOLDER, Address


@pytest.fixture
def address():
    before = open_files()
    address = Address.create()
    yield address
    address.remove()
    assert not address.folder.exists()
    assert open_files() == before


def mode(path):
    """Returns who may do what with a file."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_nobody_else_may_come_near(address, mask):
    before = os.umask(mask)
    try:
        other = Address.create()
        with other.listen():
            for one in (address, other):
                assert mode(one.folder) == 0o700
                assert mode(one.folder / "key") == 0o600
            assert mode(other.path) == 0o600
    finally:
        os.umask(before)
        other.remove()


def test_each_federation_has_its_own(address):
    other = Address.create()
    other.remove()
    assert other.folder != address.folder
    assert other.key != address.key
    assert len(bytes.fromhex(address.key)) == 32


def test_a_process_is_told_of_it(address, monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    assert Address.here() is None
    monkeypatch.setenv(FOLDER, str(address.folder))
    assert Address.here() == address


def test_a_federation_that_is_over_is_told(address, monkeypatch):
    monkeypatch.setenv(FOLDER, str(address.folder))
    address.remove()
    with pytest.raises(ConfigurationError, match="the federation that started this script is over"):
        Address.here()


def test_calls_are_answered_while_somebody_listens(address):
    with pytest.raises(FileNotFoundError):
        address.call(1)
    with address.listen() as server, address.call(1) as caller:
        stream, _ = server.accept()
        with stream:
            caller.send(b"hello")
            assert stream.recv(10) == b"hello"
            assert caller.type == socket.SOCK_SEQPACKET
    with pytest.raises(ConnectionRefusedError):
        address.call(1)


def test_the_path_fits_a_socket(address):
    assert len(str(address.path)) < 100
