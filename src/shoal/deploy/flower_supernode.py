"""Flower's SuperNode at a site: it brings messages to ``shoal site``, and runs no code of an app."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal.deploy.flower_tools import tool
from shoal.errors import ConfigurationError
from shoal.runs.files import storing, write_atomic

CLIENTAPP = "flwr-clientapp"
"""The command that a SuperNode starts for each message, and looks for on the path."""

PROGRAMS = "flower-programs"
"""The folder, in a site's, with shoal's own command of that name."""


def supernode_command(folder: Path, options: Sequence[str]) -> list[str]:
    """Returns what starts the SuperNode of a site.

    Args:
        folder: The site's, absolute.
        options: Further ones of ``flower-supernode``.

    Raises:
        ConfigurationError: The folder's path cannot be told to a SuperNode.
        MissingExtraError: Flower is not installed.
    """
    if set("'\"\\\n") & set(str(folder)):  # Flower reads a SuperNode's configuration without escapes
        raise ConfigurationError(f"{folder} cannot be told to a SuperNode: use a path without quotes and backslashes")
    return [tool("flower-supernode"), "--node-config", f"shoal-site='{folder}'", *options]


def without_app_code(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a SuperNode that runs shoal's ClientApp in the place of any app's.

    Flower by itself installs the app that a message belongs to, and runs its code as the user of the SuperNode.

    Args:
        folder: The site's.
        env: To start from.

    Raises:
        StorageError: The folder cannot be written.
    """
    programs = folder / PROGRAMS
    with storing(programs):
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = f"exec {shlex.quote(sys.executable)} -m shoal.flower"
        write_atomic(programs / CLIENTAPP, f'#!/bin/sh\n{command} "$@"\n')
        (programs / CLIENTAPP).chmod(0o700)
    return {**env, "PATH": os.pathsep.join([str(programs), env.get("PATH", os.defpath)])}
