"""Fetching a file of a known data set: whole, checked, or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shoal.errors import DataError

TIMEOUT = 30.0
"""Seconds without a byte after which a transfer is given up; what has arrived is kept for the next try."""


def data_home(name: str) -> Path:
    """Returns where a data set's files are kept: ``$SHOAL_DATA_DIR`` or ``~/.cache/shoal``, and its name."""
    return Path(os.environ.get("SHOAL_DATA_DIR", "~/.cache/shoal")).expanduser() / name


def fetch(url: str, target: Path, *, md5: str | None, timeout: float = TIMEOUT) -> Path:
    """Returns ``target`` after downloading it, unless it is there already.

    An interrupted transfer leaves ``target.part``, which the next call continues. Only a file that was found to be
    right gets the name ``target``.

    Args:
        url: Where the file is.
        target: Where to put it.
        md5: The checksum that the data's authors publish, hexadecimal. It guards against damage, not against malice.
            None for a zip archive whose authors publish none: then the checksums inside it are tried.
        timeout: Seconds without a byte after which to give up.

    Raises:
        DataError: The file cannot be had, or is not the one that was published.
    """
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part, timeout):
            if target.exists():  # another process has fetched it in the meantime
                return target
            _download(url, part, timeout)
            fault = _fault(part, md5)
            if fault is None:
                with part.open("rb") as stream:
                    os.fsync(stream.fileno())
                part.rename(target)
                return target
            part.unlink()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"{target.name} cannot be downloaded ({reason}); put it into {target.parent}") from error
    raise DataError(f"{url} gave a file {fault}; it was removed: get it elsewhere, or try again")


@contextmanager
def _alone(part: Path, timeout: float) -> Iterator[None]:
    """Waits while another process fetches the same file, such as another rank, for as long as its part grows.

    Raises:
        TimeoutError: It has not grown for twice the time-out.
    """
    path = part.with_name(part.name + ".lock")
    size, seen = -1, time.monotonic()
    while (lock := _locked(path)) is None:
        now = _size(part)
        if now != size:
            size, seen = now, time.monotonic()
        if time.monotonic() - seen > 2 * timeout:
            raise TimeoutError(f"another process is at it, and has made no progress for {2 * timeout:g} seconds")
        time.sleep(0.1)
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> IO[str] | None:
    """Returns a file that this process alone has locked; None where another has, or has just removed it."""
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    lock.close()
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it is not there yet, or has got its name
        return 0


def file_md5(path: Path) -> str:
    """Returns a file's MD5, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fault(path: Path, md5: str | None) -> str | None:
    """Returns what is wrong with a file, as it reads after "a file"."""
    if md5 is not None:
        found = file_md5(path)
        return None if found == md5 else f"with MD5 {found}, not {md5}"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error) as error:
        return f"that is no whole zip archive ({error})"
    return None if damaged is None else f"whose {damaged} is damaged"


def _download(url: str, part: Path, timeout: float) -> None:
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310 - fixed URLs
    try:
        response = urllib.request.urlopen(request, timeout=timeout)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all of it was there already; the checksum will tell
        raise
    with response, part.open("ab" if response.status == http.HTTPStatus.PARTIAL_CONTENT else "wb") as stream:
        shutil.copyfileobj(response, stream)
        expected = response.headers.get("Content-Length")
        if expected is not None and response.length:  # the connection ended early
            raise http.client.IncompleteRead(b"", response.length)
