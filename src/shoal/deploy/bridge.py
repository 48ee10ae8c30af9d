"""The thin part at a site that the engine's own client runs: it brings parcels to ``shoal site`` and back."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from shoal.deploy.parcel import Parcel, read_parcel, write_parcel
from shoal.errors import ConfigurationError, EngineError
from shoal.processes.messages import receive, send
from shoal.sites.address import Address

ADDRESS = "address.json"
"""The file in a site's folder that says where its process listens."""

CONNECT = 10.0
"""Seconds in which the site's process must take a connection."""


def site_address(folder: Path) -> Address:
    """Returns where the process of the site listens whose folder this is.

    Raises:
        ConfigurationError: None has been started there.
    """
    try:
        told = json.loads((folder / ADDRESS).read_text(encoding="utf-8"))
        where = Path(told["socket"])
        return Address(where, (where / "key").read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"no shoal site runs in {folder}: start it with `shoal site {folder}`") from error


def forward(parcel: Parcel, folder: Path, *, within: float) -> Parcel:
    """Brings a parcel to the site's process, and returns its answer.

    Args:
        parcel: From the server.
        folder: The site's.
        within: Seconds in which the answer must be there.

    Raises:
        ConfigurationError: The site's process was not started.
        EngineError: It is gone, or gave no answer, or none that can be read.
    """
    address = site_address(folder)
    until = time.monotonic() + within
    try:
        with contextlib.closing(address.call(min(CONNECT, within))) as stream:
            fd = write_parcel(parcel)
            try:
                send(stream, {"key": address.key}, fd)
            finally:
                os.close(fd)
            stream.settimeout(max(until - time.monotonic(), 0.001))
            received = receive(stream)
        if received is None or received[1] is None:
            raise EngineError(f"the shoal site in {folder} ended before it answered")
        return read_parcel(received[1])
    except TimeoutError as error:
        raise EngineError(f"the shoal site in {folder} gave no answer within {within:g} s") from error
    except OSError as error:
        raise EngineError(f"the shoal site in {folder} cannot be reached: {error}") from error
    except ValueError as error:
        raise EngineError(f"what the shoal site in {folder} answered cannot be read: {error}") from error
