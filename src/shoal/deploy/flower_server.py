"""Shoal's server in the process of a ServerApp."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shoal.deploy.flower_return import packed
from shoal.errors import ConfigurationError, EngineError, ShoalError

ORDER = "order"
"""The key in the run configuration: what to run, as JSON."""

NONCE = "nonce"
"""The key in the run configuration: what the lines are recognised by with which the run's folder goes back; empty where
it is to stay."""

BATCH, PAUSE, SETTLE = 80, 0.3, 2.0
"""Lines of a run's folder that are written at once, half a megabyte; and seconds between such, and after the last."""

FILES = "experiment"
"""The folder in an app with the files of its experiment."""

OUTCOME = "shoal: run "
"""How the line begins that says how the run ended; what Flower says after it of the same matter, need not be read."""


def serve(config: Mapping[str, Any], folder: Path, read: Callable[[str], Any], run: Callable[[Any], object]) -> None:
    """Runs the order in a run configuration, and says in its last line how it ended.

    Args:
        config: The run configuration.
        folder: The app's own.
        read: Makes an order from JSON.
        run: Runs it.

    Raises:
        ShoalError: The run did not end well; Flower then marks it as failed.
    """
    try:
        with _ctrl_c():
            order = read(_order_text(config))
            order = dataclasses.replace(order, experiment=located(order.experiment, folder))
            if not order.run_dir:
                order = dataclasses.replace(order, run_dir=_new_folder())
                print(f"on {socket.gethostname()} the run is in {order.run_dir}", flush=True)  # noqa: T201 - Flower's log
            run(order)
    except ShoalError as error:
        say(f"failed: {error}")
        raise
    except KeyboardInterrupt as stopped:  # flwr stop, or the SuperLink's end
        say(f"stopped: {stopped}")
        raise EngineError(f"the run was stopped: {stopped}") from stopped
    if nonce := config.get(NONCE):
        send_back(Path(order.run_dir), str(nonce))
    say(f"completed: {order.run_dir}")


def located(experiment: str, folder: Path) -> str:
    """Returns an experiment by its path where the app has brought its file, and by its name where it has not."""
    carried = folder / FILES / experiment
    if Path(experiment).is_absolute() or not carried.exists():
        return experiment
    return str(carried.resolve())


def say(outcome: str) -> None:
    """Writes a line that whoever has submitted the run reads, however many lines the text has."""
    print(OUTCOME + " ".join(outcome.split()), flush=True)  # noqa: T201 - the run's log is what Flower carries


def _new_folder() -> str:
    """Returns a folder for a run of which the order does not say where it is to be: where the SuperLink was started."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return str(Path("runs", f"flower-{stamp}-{secrets.token_hex(2)}").resolve())


def send_back(folder: Path, nonce: str) -> None:
    """Writes a run's folder into the run's log, no faster than Flower carries that.

    Flower takes what was written meanwhile in one request, and at the end waits for a few seconds only.
    """
    for number, line in enumerate(packed(folder, nonce), 1):
        print(line, flush=True)  # noqa: T201 - the run's log is what Flower carries
        if number % BATCH == 0:
            time.sleep(PAUSE)
    time.sleep(SETTLE)


def _order_text(config: Mapping[str, Any]) -> str:
    text = config.get(ORDER)
    if not isinstance(text, str) or not text:
        raise ConfigurationError(
            f"the run configuration has no {ORDER!r}: write the app with `shoal export … --to flower`"
        )
    return text


@contextlib.contextmanager
def _ctrl_c() -> Iterator[None]:
    """Has SIGINT, by which Flower tells that a run was stopped, end the block as Ctrl-C does, with the state saved.

    Flower's own handler would end the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
