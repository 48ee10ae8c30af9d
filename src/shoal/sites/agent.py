"""The launcher of one site: a process that starts its ranks, watches them, and tells the server how they end."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from shoal.processes.messages import Message, receive, send
from shoal.sites.address import ATTEMPT, FOLDER, NAME, Address

CONNECT = 30.0
"""Seconds in which the server must answer."""


def attend(
    address: Address, site: str, body: Sequence[str] | Callable[[], None], ranks: int, *, of_tensorflow: bool
) -> None:
    """Starts a site's ranks whenever the server says so, until it ends.

    Args:
        address: The server's.
        site: The site's name.
        body: The command of a rank, or what to call in one that is forked from this process.
        ranks: How many there are.
        of_tensorflow: Whether they are TensorFlow's workers.
    """
    os.environ[FOLDER], os.environ[NAME] = str(address.folder), site
    with address.call(CONNECT) as server:
        server.settimeout(None)
        orders = _Orders(server)
        send(server, {"key": address.key, "site": site, "attempt": 0})
        while (attempt := orders.next_launch()) is not None:
            os.environ[ATTEMPT] = str(attempt)
            with contextlib.suppress(OSError):  # the server is gone
                send(server, {"launching": True, "attempt": attempt})
                told = _launch(body, ranks, orders, address, of_tensorflow=of_tensorflow)
                send(server, told | {"attempt": attempt})
        if orders.lost:
            address.remove()  # as the server would have done


class _Orders:
    """What the server says, heard in a thread while ranks run.

    Args:
        server: The connection.
    """

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self.lost = True
        """At the end: whether the server is gone without a word."""
        self._launches: queue.Queue[int | None] = queue.Queue()
        self._running = False
        self._lock = threading.Lock()  # so that no signal comes once the ranks have ended
        threading.Thread(target=self._listen, name="shoal-orders", daemon=True).start()

    def next_launch(self) -> int | None:
        """Waits for the next order to start the ranks; returns its number, or None at the end."""
        return self._launches.get()

    @contextlib.contextmanager
    def running(self) -> Any:
        """The context in which ranks run: it is interrupted by SIGTERM when they are to stop, or to start anew."""
        with self._lock:
            self._running = True
        try:
            yield
        finally:
            with self._lock:
                self._running = False

    def _listen(self) -> None:
        while (order := self._hear()) is not None:
            if "launch" in order:
                self._launches.put(int(order["launch"]))
                self._interrupt()  # the server has given up those that run
            elif "stop" in order:
                self.lost = False
                break
        self._launches.put(None)
        self._interrupt()

    def _interrupt(self) -> None:
        with self._lock:
            if self._running:
                os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self) -> Message | None:
        try:
            received = receive(self._server)
        except (OSError, ValueError):
            return None
        return received[0] if received else None


def _launch(
    body: Sequence[str] | Callable[[], None], ranks: int, orders: _Orders, address: Address, *, of_tensorflow: bool
) -> dict[str, Any]:
    """Runs the ranks to their end; returns what to tell of it."""
    from shoal.learners.torch_launch import RanksFailedError, launch_ranks

    try:
        with orders.running():
            launch_ranks(body, processes=ranks, all_heard=True, within=address.folder, of_tensorflow=of_tensorflow)
    except RanksFailedError as error:
        failure = error.failure
        told = {"rank": failure.rank, "what": str(failure), "by_others": failure.by_others}
        return {"failed": told | {"lines": [line[:200] for line in failure.lines]}}
    except (Exception, KeyboardInterrupt) as error:
        return {"failed": {"what": f"its ranks could not be run: {type(error).__name__}: {error}"[:2000]}}
    return {"ended": True}


def main(arguments: Sequence[str]) -> None:
    """Is the process: ``python -m shoal.sites.agent RANKS STRATEGY COMMAND …``."""
    address = Address.here()
    if address is None:
        raise SystemExit("shoal.sites.agent is started by a federation's server")
    ranks, strategy, *command = arguments
    of_tensorflow = strategy == "multiworker"
    if of_tensorflow:
        command = [command[0], "-m", "shoal.sites.tensorflow_worker", *command]
    attend(address, os.environ[NAME], command, int(ranks), of_tensorflow=of_tensorflow)


if __name__ == "__main__":
    main(sys.argv[1:])
