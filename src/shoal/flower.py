"""The two apps of Flower's in which shoal's federation runs: at the server, and at the sites.

An app that ``shoal export --to flower`` has written refers to them::

    # client_app.py
    import shoal.flower

    app = shoal.flower.client_app
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from shoal.deploy.bridge import forward
from shoal.deploy.flower_clientapp import replace
from shoal.deploy.flower_records import parcel_of, records_of
from shoal.deploy.parcel import Parcel
from shoal.errors import ConfigurationError, MissingExtraError, ShoalError

try:
    from flwr.app import Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
except ModuleNotFoundError as missing:
    raise MissingExtraError("flwr", purpose="run in Flower's processes", extra="flower") from missing

__all__ = ["client_app", "make_server_app", "server_app"]

SITE = "shoal-site"
"""The key in a SuperNode's configuration: the folder of the site."""

WIDTH = 140
"""Characters of a line in the run's log."""

SECONDS = "seconds"
"""Where a request says how long the server waits for its answer."""

LATE = 60.0
"""Seconds after that time in which a site may still answer, as the server's may have begun later."""

SPARE = 5.0
"""Seconds before a message ends in which its reply must be on its way."""


def make_server_app(folder: Path) -> Any:
    """Returns a ServerApp that runs the order in its run configuration.

    Args:
        folder: Against which an experiment that is a relative path is resolved.
    """
    app = ServerApp()

    def main(grid: Any, context: Any) -> None:
        from rich.console import Console

        from shoal.deploy.flower_server import serve
        from shoal.deploy.flower_wire import FlowerWire
        from shoal.deploy.order import Order
        from shoal.experiments.remote import run_over
        from shoal.federation import Progress

        console = Console(width=WIDTH, highlight=False, force_terminal=False)  # a log's, which Flower carries by lines
        serve(
            context.run_config,
            folder,
            Order.from_json,
            lambda order: run_over(FlowerWire(grid), order, (Progress(console),)),
        )

    app.main()(main)
    return app


def _answer(message: Any, context: Any) -> Any:
    """Brings a message to the site's own process, and returns the reply; a failure is one that says so."""
    try:
        parcel = parcel_of(message.content)
        answer = forward(parcel, _site(context), within=_left(message, parcel))
    except (ShoalError, OSError, ValueError) as error:
        answer = Parcel(meta={"error": str(error)})
    except Exception as error:  # Flower would send its kind alone
        answer = Parcel(meta={"error": f"{type(error).__name__}: {error}"})
    return Message(records_of(answer), reply_to=message)


def _site(context: Any) -> Path:
    folder = context.node_config.get(SITE)
    if not isinstance(folder, str) or not folder:
        raise ConfigurationError(
            "this SuperNode does not know its shoal site: start it with shoal supernode /path/of/the/site …"
        )
    return Path(folder)


def _left(message: Any, parcel: Parcel) -> float:
    """Returns the seconds in which somebody waits for the answer: meanwhile this SuperNode does nothing else."""
    told = message.metadata
    left = float(told.created_at + told.ttl - time.time()) - SPARE
    wanted = parcel.meta.get(SECONDS)
    return max(min(left, float(wanted) + LATE) if isinstance(wanted, int | float) else left, 1.0)


server_app = make_server_app(Path())
"""A ServerApp for an order whose experiment is a built-in one, or an absolute path."""

client_app = ClientApp()
"""The ClientApp of every site: it knows no model, and imports no framework."""
client_app.train()(_answer)


def main() -> None:
    """Is the process that ``shoal supernode`` starts for each message: ``python -m shoal.flower …``.

    It is Flower's ``flwr-clientapp``, but for the app: nothing of it is unpacked, installed or imported.
    """
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    replace(run_clientapp, client_app)
    flwr_clientapp()


if __name__ == "__main__":
    main()
