"""Where the processes of sites find the server: a socket in a folder that nobody else may enter, and a key."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shoal.errors import ConfigurationError

FOLDER = "SHOAL_SITES"
"""The environment variable with the folder."""

NAME = "SHOAL_SITE"
"""The environment variable with the site's name."""

ATTEMPT = "SHOAL_ATTEMPT"
"""The environment variable with the number of the site's start, from 0."""


@dataclass(frozen=True)
class Address:
    """A folder with a socket and a key, both readable by this user alone."""

    folder: Path
    """Where they are."""
    key: str
    """What a process must say to be let in."""

    @classmethod
    def create(cls) -> Self:
        """Returns a new address; :meth:`remove` ends it."""
        # Short, because the path of a socket may have 107 bytes; and private, as mkdtemp makes it.
        folder = Path(tempfile.mkdtemp(prefix="shoal-", dir="/tmp"))
        key = secrets.token_hex(32)
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_text(key)
        return cls(folder, key)

    @classmethod
    def here(cls) -> Self | None:
        """Returns the address that this process was given; None outside of a federation.

        Raises:
            ConfigurationError: It is no longer there.
        """
        if FOLDER not in os.environ:
            return None
        folder = Path(os.environ[FOLDER])
        try:
            return cls(folder, (folder / "key").read_text())
        except OSError as error:
            raise ConfigurationError(f"the federation that started this script is over: {error}") from error

    @property
    def path(self) -> Path:
        """The socket's."""
        return self.folder / "socket"

    def listen(self) -> socket.socket:
        """Returns the server's socket."""
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.bind(str(self.path))
        self.path.chmod(0o600)
        server.listen(128)
        server.setblocking(False)
        return server

    def call(self, within: float) -> socket.socket:
        """Returns a connection to the server.

        Args:
            within: Seconds.

        Raises:
            OSError: Nobody listens.
        """
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            stream.settimeout(within)
            stream.connect(str(self.path))
        except OSError:
            stream.close()
            raise
        return stream

    def remove(self) -> None:
        """Removes the folder: nobody can come any more."""
        shutil.rmtree(self.folder, ignore_errors=True)
