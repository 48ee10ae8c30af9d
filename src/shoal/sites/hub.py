"""The server's side of all sites' connections: who may come in, and what they say."""

from __future__ import annotations

import math
import os
import secrets
import selectors
import time
from collections.abc import Mapping
from typing import Any

from shoal.processes.messages import Message
from shoal.processes.tensors import TensorFile
from shoal.sites.address import Address
from shoal.sites.connection import Connection
from shoal.sites.state import Failure, Reply, SiteState

INTRODUCTION = 5.0
"""Seconds in which somebody who has connected must have said who it is."""


class Hub:
    """Takes in the processes of the sites, and nobody else, and keeps the sites' states up to date.

    Nothing happens between two calls to :meth:`poll`; what was said meanwhile waits in the sockets, so that a server
    that was busy judges nobody by that.

    Args:
        states: The sites by name.
    """

    def __init__(self, states: Mapping[str, SiteState]) -> None:
        self.address = Address.create()
        """Where the sites' processes are to connect."""
        self._states = states
        self._listener = self.address.listen()
        self._strangers: list[Connection] = []
        self._connections: set[Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def poll(self, seconds: float) -> None:
        """Hears what is said, and waits for that at most so long."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._accept()
            else:
                self._hear(key.data)
        now = time.monotonic()
        for stranger in [one for one in self._strangers if now - one.heard > INTRODUCTION]:
            self._drop(stranger)
        for state in self._states.values():
            for connection in (state.agent, *state.ranks.values()):
                if connection is None or connection.gone:
                    continue
                connection.flush()
                if connection.over:
                    self._hear(connection)
                    self._unregister(connection)

    def forget(self, connection: Connection) -> None:
        """Ends a connection that matters no more."""
        if not connection.gone:
            self._selector.unregister(connection.stream)
        self._close(connection)

    def close(self) -> None:
        """Ends all connections, and takes the address back."""
        for connection in list(self._connections):  # those that have ended too
            self._close(connection)
        self._selector.close()
        self._listener.close()
        self.address.remove()

    def _accept(self) -> None:
        try:
            stream, _ = self._listener.accept()
        except OSError:  # it has thought better of it
            return
        try:
            connection = Connection(stream)
        except OSError:
            stream.close()
            return
        if connection.user != os.getuid():
            connection.close()
            return
        self._connections.add(connection)
        self._strangers.append(connection)
        self._selector.register(stream, selectors.EVENT_READ, connection)

    def _hear(self, connection: Connection) -> None:
        try:
            while (received := connection.read()) is not None:
                message, fd = received
                if connection.site:
                    self._take(self._states[connection.site], connection, message, fd)
                else:
                    _close(fd)
                    self._introduce(connection, message)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._distrust(connection, error)
        if connection.gone:
            self._unregister(connection)

    def _introduce(self, connection: Connection, hello: Message) -> None:
        """Lets a process in that knows the key."""
        said = str(hello.get("key", "")).encode(errors="replace")
        state = self._states.get(str(hello.get("site")))
        known = secrets.compare_digest(said, self.address.key.encode()) and state is not None
        if not known or state is None or int(hello["attempt"]) != state.attempt:
            self._drop(connection)
            return
        rank = None if hello.get("rank") is None else int(hello["rank"])
        if rank in state.ranks or (rank is None and state.agent is not None):  # a child of a rank's, such as a loader
            self._drop(connection)
            return
        self._strangers.remove(connection)
        connection.site = state.site.name
        if rank is None:
            state.agent = connection
            return
        if not 0 <= rank < state.site.ranks or hello["ranks"] != state.site.ranks:
            state.failure = Failure(
                what=f"a process came as rank {rank} of {hello['ranks']}, of which {state.site.ranks} are known: "
                "let the site's launcher start the ranks"
            )
            return
        state.ranks[rank] = connection
        connection.post({"welcome": {"config": dict(state.site.config)}})

    def _take(self, state: SiteState, connection: Connection, message: Message, fd: int | None) -> None:
        if "reply" in message:
            self._take_reply(state, message["reply"], fd)
            return
        _close(fd)
        if "doing" in message:
            connection.does(str(message["doing"]))
            state.evaluates |= bool(message.get("evaluates"))
        elif "where" in message:
            connection.where = str(message["where"])
        elif message.get("attempt") != state.attempt:  # its launcher tells of ranks that were given up
            return
        elif "launching" in message:
            state.since = time.monotonic()  # those of the attempt before took their time to end
        elif "failed" in message:
            state.failure = _failure(message["failed"])
        elif "ended" in message:
            state.ended = True

    def _take_reply(self, state: SiteState, told: Mapping[str, Any], fd: int | None) -> None:
        """Keeps the answer to the task that the site was given; one to an earlier task comes too late."""
        if told["task"] != state.task:
            _close(fd)
            return
        tree = str(told["tree"])
        if (fd is None) != (tree == ""):
            _close(fd)
            raise ValueError("a reply's arrays are missing")
        file = None if fd is None else TensorFile(fd)
        try:
            metrics = {str(name): float(value) for name, value in told["metrics"].items()}
            examples, seconds = float(told["examples"]), float(told.get("seconds", 0.0))
        except BaseException:
            if file is not None:
                file.close()
            raise
        if not (math.isfinite(examples) and examples > 0):
            state.failure = Failure(what=f"replied with {examples:g} examples, and must have more than 0", rank=0)
        state.reply = Reply(
            task=told["task"], examples=examples, metrics=metrics, tree=tree, file=file, seconds=seconds
        )

    def _distrust(self, connection: Connection, error: Exception) -> None:
        """Ends a connection over which something else came than a process of a site would say."""
        if connection.site and not connection.gone:
            state = self._states[connection.site]
            state.failure = Failure(what=f"process {connection.pid} said what makes no sense: {error}")
            self._unregister(connection)
        elif not connection.site:
            self._drop(connection)

    def _drop(self, stranger: Connection) -> None:
        if stranger in self._strangers:
            self._strangers.remove(stranger)
        self._unregister(stranger)
        self._close(stranger)

    def _close(self, connection: Connection) -> None:
        self._connections.discard(connection)
        connection.close()

    def _unregister(self, connection: Connection) -> None:
        if not connection.gone:
            connection.gone, connection.changed = True, time.monotonic()
        if connection.stream.fileno() >= 0 and connection.stream in self._selector.get_map():
            self._selector.unregister(connection.stream)
        if connection in self._strangers:
            self._strangers.remove(connection)
            self._close(connection)


def _failure(told: Mapping[str, Any]) -> Failure:
    rank = told.get("rank")
    return Failure(
        what=str(told["what"]),
        rank=None if rank is None else int(rank),
        lines=tuple(told.get("lines", ())),
        by_others=bool(told.get("by_others")),
    )


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
