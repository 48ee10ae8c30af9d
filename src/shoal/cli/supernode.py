"""``shoal supernode``: Flower's SuperNode at a real site, without the code of apps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def supernode(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The site's folder, with its site.toml.")],
) -> None:
    """Start Flower's SuperNode for a site; further options are those of flower-supernode. No app's code runs here."""
    from shoal.deploy.flower_supernode import supernode_command, without_app_code
    from shoal.deploy.flower_tools import environment
    from shoal.deploy.site_settings import SiteSettings

    place = folder.resolve()
    SiteSettings.read(place)  # a mistyped folder is told here, and not with the first message
    command = supernode_command(place, context.args)
    os.execve(command[0], command, without_app_code(place, environment(None)))  # noqa: S606 - it is no shell's
