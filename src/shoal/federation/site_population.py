"""Sites as the clients of a federation whose data this process never sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.data import Population
from shoal.data.dataset import ArrayDataset
from shoal.sites import Site


class SitePopulation(Population):
    """The sites that run a script, or keep their data to themselves. Each is one client, with nothing to read here.

    Args:
        sites: In the order of the clients' numbers.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        count = len(sites)
        nothing = ArrayDataset(np.zeros((count, 1), np.float32), np.zeros(count, np.float32), name="sites")
        super().__init__(nothing, np.arange(count), np.arange(count + 1), names=[site.name for site in sites])
        self._sites = sites

    def label_counts(self, clients: Sequence[int]) -> None:
        """Returns None: the labels are at the sites."""

    def describe(self) -> dict[str, Any]:
        """Returns what decides the sites' numbers, as JSON."""
        return {"sites": [site.describe() for site in self._sites]}
