"""Certificates and keys: what a server proves itself with, and what sites do."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import ConfigurationError, MissingExtraError
from shoal.runs.files import storing, sync_folder, temporary_name

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

LOOPBACK = ("127.0.0.1", "localhost")
"""The names of a server that its own machine calls."""

SKEW = datetime.timedelta(hours=1)
"""By which another machine's clock may be behind."""


@dataclass(frozen=True)
class ServerCertificates:
    """The files that a server needs to be called over TLS."""

    authority: Path
    """The certificate that whoever calls the server must have."""
    certificate: Path
    """The server's own."""
    key: Path
    """The server's private key."""


def write_server_certificates(
    folder: Path, names: Sequence[str] = LOOPBACK, *, days: int = 825, extra: str = "flower"
) -> ServerCertificates:
    """Writes a certificate for a server, and that of the authority that signed it.

    The authority's own key is kept nowhere: nobody can sign another certificate that the sites would believe.

    Args:
        folder: Where to write; made where it is not there.
        names: The addresses under which sites call the server: names and numbers.
        days: For how long it is valid.
        extra: The extra of shoal that brings what is needed.

    Raises:
        ConfigurationError: There is no name.
        MissingExtraError: The package ``cryptography`` is not installed.
        StorageError: The files cannot be written.
    """
    if not names:
        raise ConfigurationError("a server's certificate needs the names under which sites call it, such as localhost")
    _check_installed(extra)
    authority_key, key = _new_key(), _new_key()
    authority = _authority(authority_key, days)
    certificate = _signed(key, names, days, authority, authority_key)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = ServerCertificates(folder / "ca.crt", folder / "server.pem", folder / "server.key")
    write_private(files.authority, _certificate_bytes(authority))
    write_private(files.certificate, _certificate_bytes(certificate))
    write_private(files.key, _key_bytes(key, openssh=False))
    return files


def write_node_key(folder: Path, name: str, *, extra: str = "flower") -> Path:
    """Writes the key pair of a site: ``NAME`` and ``NAME.pub``, in the formats of SSH.

    Args:
        folder: Where to write; made where it is not there.
        name: The site's.
        extra: The extra of shoal that brings what is needed.

    Returns:
        The path of the private key.

    Raises:
        MissingExtraError: The package ``cryptography`` is not installed.
        StorageError: The files cannot be written.
    """
    _check_installed(extra)
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = _new_key()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    private = folder / name
    write_private(private, _key_bytes(key, openssh=True))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_private(folder / f"{name}.pub", public + b" " + name.encode() + b"\n")
    return private


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that nobody else may read, whole or not at all.

    Raises:
        StorageError: The disk is full or refuses.
    """
    temporary = path.with_name(temporary_name(path.name))
    with storing(path):
        temporary.unlink(missing_ok=True)
        try:
            # Nobody can have opened it before it is private, as they could if its mode were changed afterwards.
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _check_installed(extra: str) -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as missing:
        raise MissingExtraError("cryptography", purpose="make certificates and keys", extra=extra) from missing


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _authority(key: EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    from cryptography import x509

    name = _named("shoal federation")
    usage = _usage(signs=True)
    builder = _builder(name, name, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return _sign(builder.add_extension(usage, critical=True), key, key)


def _signed(
    key: EllipticCurvePrivateKey,
    names: Sequence[str],
    days: int,
    authority: x509.Certificate,
    authority_key: EllipticCurvePrivateKey,
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    builder = _builder(_named("shoal server"), authority.subject, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_called(name) for name in names]), critical=False)
    return _sign(builder, key, authority_key)


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _sign(
    builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey, by: EllipticCurvePrivateKey
) -> x509.Certificate:
    """Signs what is said of a key, with the key identifiers that a strict reader asks for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
    builder = builder.add_extension(own, critical=False).add_extension(signer, critical=False)
    return builder.sign(by, hashes.SHA384())


def _usage(*, signs: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _named(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _called(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _certificate_bytes(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key_bytes(key: EllipticCurvePrivateKey, *, openssh: bool) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    kind = PrivateFormat.OpenSSH if openssh else PrivateFormat.PKCS8
    return key.private_bytes(Encoding.PEM, kind, NoEncryption())
