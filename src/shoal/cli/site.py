"""``shoal site``: the process at a real site that has its data, its devices and its say."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def site(
    folder: Annotated[Path, typer.Argument(help="The site's folder, with its site.toml; records and logs go there.")],
    check: Annotated[bool, typer.Option("--check", help="Read site.toml, say what it allows, and end.")] = False,
) -> None:
    """Serve a real site: take part in federations of the experiments that site.toml allows."""
    from shoal.deploy.site_server import SiteServer
    from shoal.deploy.site_settings import SiteSettings

    if check:
        settings = SiteSettings.read(folder)
        for entry in settings.allowed.values():
            print(f"{settings.name} allows {entry.name}: {entry.source}")
        return
    os.umask(0o077)  # records and logs tell of the site's data: they are its owner's alone
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    server = SiteServer(folder.resolve(), [sys.executable, "-m", "shoal.experiments.at_site"])
    try:
        print(f"shoal: {server.settings.name} is ready in {folder}", flush=True)
        server.serve()
    except KeyboardInterrupt as error:
        raise type(error)(f"{server.settings.name} has ended") from error
    finally:
        server.close()
