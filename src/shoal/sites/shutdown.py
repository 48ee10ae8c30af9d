"""The end of all processes of all sites: by themselves, by request, or by force."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Sequence

from shoal.processes.table import in_sessions, marked
from shoal.sites.address import FOLDER
from shoal.sites.connection import Connection
from shoal.sites.hub import Hub
from shoal.sites.state import SiteState

REQUEST = 3.0
"""Seconds from the request to end to the end by force."""

FORCE = 5.0
"""Seconds in which the system ends processes that were killed."""

LOOK = 0.05


def finish_sites(hub: Hub, states: Sequence[SiteState], *, within: float) -> list[SiteState]:
    """Tells all ranks that there are no more tasks, and waits for the ends of their scripts.

    Args:
        hub: Where they are connected.
        states: All sites.
        within: Seconds.

    Returns:
        The sites whose scripts failed after that, or did not end in time.
    """
    there = [state for state in states if state.out is None]
    told: set[Connection] = set()

    def over() -> bool:
        for rank in [rank for state in there for rank in state.ranks.values() if rank not in told]:
            rank.post({"end": "done"})
            told.add(rank)
        return all(_is_over(state) for state in there)

    for state in there:
        state.ended = False
    _wait(hub, over, within)  # for ranks, too, that are still starting: a resumed run may have no round left
    return [state for state in there if not state.ended]


def stop_sites(hub: Hub, states: Sequence[SiteState], launchers: Collection[int]) -> None:
    """Ends all processes that belong to the sites, whatever they are at, and returns when there are none.

    Args:
        hub: Where they are connected.
        states: All sites.
        launchers: The processes of the sites' launchers, whose ends nobody has yet waited for.
    """
    for state in states:
        if state.agent is not None:
            state.agent.post({"stop": True})
    _wait(hub, lambda: not _left(hub, launchers), REQUEST)
    until = time.monotonic() + FORCE
    while (left := _left(hub, launchers)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK)


def _is_over(state: SiteState) -> bool:
    return state.ended or state.failure is not None or state.agent is None or state.agent.gone


def _left(hub: Hub, launchers: Collection[int]) -> list[int]:
    """Returns the processes that were started for the sites, and whatever those have started."""
    # A program has the mark in its environment; what is forked has not, but stays in its launcher's session.
    return [*marked(FOLDER, str(hub.address.folder)), *in_sessions(launchers)]


def _wait(hub: Hub, over: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not over() and time.monotonic() < until:
        hub.poll(LOOK)
