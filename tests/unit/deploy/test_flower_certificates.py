"""Certificates and keys: who believes them, and who may read them."""

import contextlib
import ssl
import threading
from pathlib import Path

import pytest

from shoal.deploy.certificates import ServerCertificates, write_node_key, write_private, write_server_certificates
from shoal.errors import ConfigurationError, StorageError

pytest.importorskip("cryptography")


def _greet(files: ServerCertificates, called: str) -> str | None:
    """Has a client and a server meet over TLS; returns the version they speak."""
    import socket

    ours, theirs = socket.socketpair()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    client = ssl.create_default_context(cafile=str(files.authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT

    def serve() -> None:
        with contextlib.suppress(OSError):
            server.wrap_socket(ours, server_side=True).close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        theirs.settimeout(10)
        with client.wrap_socket(theirs, server_hostname=called) as stream:
            return stream.version()
    finally:
        theirs.close()
        ours.close()
        thread.join(10)


@pytest.mark.parametrize("called", ["127.0.0.1", "localhost", "fl.example.org"])
def test_a_strict_client_believes_the_server_under_all_its_names(tmp_path: Path, called: str) -> None:
    files = write_server_certificates(tmp_path, ["127.0.0.1", "localhost", "fl.example.org"])
    assert _greet(files, called) == "TLSv1.3"


def test_a_client_does_not_believe_another_name(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        _greet(write_server_certificates(tmp_path), "fl.example.org")


def test_a_client_does_not_believe_another_authority(tmp_path: Path) -> None:
    files = write_server_certificates(tmp_path / "one")
    other = write_server_certificates(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        _greet(ServerCertificates(other.authority, files.certificate, files.key), "localhost")


def test_a_server_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="such as localhost"):
        write_server_certificates(tmp_path, [])


def test_nobody_else_may_read_what_is_written(tmp_path: Path) -> None:
    write_server_certificates(tmp_path)
    write_node_key(tmp_path, "hospital-a")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_node_key_is_one_that_ssh_knows(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    private = write_node_key(tmp_path, "hospital-a")
    key = load_ssh_private_key(private.read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "hospital-a.pub").read_bytes())
    assert isinstance(key, EllipticCurvePrivateKey)
    assert isinstance(public, EllipticCurvePublicKey)
    assert key.curve.name == "secp384r1"
    assert key.public_key().public_numbers() == public.public_numbers()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_private(tmp_path / "key", b"old")
    with pytest.raises(StorageError):
        write_private(tmp_path / "nowhere" / "key", b"new")
    assert (tmp_path / "key").read_bytes() == b"old"
