"""What rank 0 of a site was sent, brought to its other ranks through torch.distributed."""

from __future__ import annotations

import atexit
import datetime
import os
import time
from typing import Any

import numpy as np

from shoal.devices import Launched
from shoal.errors import WorkerError

PIECE = 1 << 26
"""Bytes that are sent at a time."""

MEETING = 60.0
"""Seconds in which the ranks of a site must have connected with each other."""

PATIENCE = datetime.timedelta(hours=24)
"""How long a rank waits for the others within an exchange. The server gives a site up long before, and its launcher
then ends the ranks."""


FIRST = 1.0
"""Seconds that a rank lives on that has lost another, so that the launcher sees the end of that one first."""


class RankGroup:
    """The ranks of one site, joined beside whatever groups the user's script makes.

    It is gloo's, over the CPU, and no part of ``torch.distributed``'s default group, so that the script may make and
    end that when it likes.

    Args:
        place: This rank's.

    Raises:
        WorkerError: The ranks do not find each other.
    """

    def __init__(self, place: Launched) -> None:
        import torch
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

        self._torch: Any = torch
        self._group: Any = None
        self.leads = place.rank == 0
        """Whether this is rank 0."""
        keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the launcher does
        meeting = datetime.timedelta(seconds=MEETING)
        try:
            store = TCPStore(
                place.address, place.port, is_master=keeps, timeout=meeting, wait_for_workers=False, multi_tenant=keeps
            )
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            named = PrefixStore(f"shoal-client-{restart}", store)
            self._group = ProcessGroupGloo(named, place.rank, place.count, meeting)
            self._group.set_timeout(PATIENCE)
            atexit.register(self.close)  # its threads must end before Python does
        except RuntimeError as error:
            raise WorkerError(f"the site's {place.count} ranks did not meet: {str(error).splitlines()[0]}") from error

    def from_leader(self, data: np.ndarray | None) -> np.ndarray:
        """Returns the bytes that rank 0 gives; the others give None.

        Args:
            data: Shape [bytes], uint8.

        Raises:
            WorkerError: Another rank is gone.
        """
        size = np.array([0 if data is None else len(data)], np.int64)
        self._copy(size.view(np.uint8))
        found = np.empty(int(size[0]), np.uint8) if data is None else data
        for start in range(0, len(found), PIECE):
            self._copy(found[start : start + PIECE])
        return found

    def close(self) -> None:
        """Parts from the other ranks."""
        self._group = None

    def _copy(self, memory: np.ndarray) -> None:
        """Overwrites memory with that of rank 0."""
        try:
            self._group.broadcast(self._torch.from_numpy(memory), 0).wait()
        except RuntimeError as error:
            time.sleep(FIRST)
            first = str(error).splitlines()[0]
            raise WorkerError(f"another rank is gone: {first}") from error
