"""Measuring the global model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shoal.data import Dataset
from shoal.engines import SiteEngine
from shoal.federation.cohorts import ClientShards
from shoal.learners.base import Learner
from shoal.types import ModelState

PERCENTILES = {"p10": 10, "p50": 50, "p90": 90}


class Evaluator:
    """Measures the global model on held-out data and on the validation examples of a panel of clients.

    Args:
        learner: Knows the model and the metrics.
        held_out: Data of no client; None for none.
        shards: The clients' data.
        panel: The clients to validate on; empty for none.
        sites: Where clients are sites that can measure the model themselves, the engine that has them do so.
    """

    def __init__(
        self,
        learner: Learner,
        held_out: Dataset | None,
        shards: ClientShards,
        panel: Sequence[int],
        sites: SiteEngine | None = None,
    ) -> None:
        self._sites = sites
        self._learner = learner
        self._held_out = held_out
        self._shards = shards
        self._panel = panel

    def __bool__(self) -> bool:
        return self._held_out is not None or bool(self._panel) or self._sites is not None

    def measure(self, model: ModelState, round: int) -> dict[str, float]:
        """Returns the held-out metrics by their names, and the clients' as ``client_…`` with their spread.

        Where there are no held-out data, the means over the sites' examples have the names of those.

        Args:
            model: The global model.
            round: After which round.
        """
        measured = dict(self._learner.evaluate(model, self._held_out)) if self._held_out is not None else {}
        pooled = ClientMetrics("client")
        for client in self._panel:
            data = self._shards.validation(client)
            if data is not None:
                pooled.add(self._learner.evaluate(model, data), weight=len(data))
        if self._sites is not None:
            for examples, metrics in self._sites.measure(self._learner, model, round).values():
                pooled.add(metrics, weight=examples)
        alone = self._held_out is None and self._sites is not None
        return (pooled.means() if alone else measured) | pooled.summary()


class ClientMetrics:
    """Metrics of many clients: the mean over their examples, and the spread over the clients.

    Args:
        prefix: Heads the names, as in ``train_loss``.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._values: dict[str, list[float]] = {}
        self._weights: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float], weight: float) -> None:
        """Adds one client's means over ``weight`` examples."""
        for name, value in metrics.items():
            self.extend(name, [value], [weight])

    def extend(self, name: str, values: Sequence[float], weights: Sequence[float]) -> None:
        """Adds one metric of many clients: each one's mean, over so many examples."""
        self._values.setdefault(name, []).extend(values)
        self._weights.setdefault(name, []).extend(weights)

    def means(self) -> dict[str, float]:
        """Returns the means over examples, by the metrics' own names."""
        return {name: float(np.average(values, weights=self._weights[name])) for name, values in self._values.items()}

    def summary(self) -> dict[str, float]:
        """Returns ``prefix_name`` (mean over examples) and ``prefix_name_p10``, ``_p50``, ``_p90`` (over clients)."""
        summary = {f"{self._prefix}_{name}": value for name, value in self.means().items()}
        for name, values in self._values.items():
            at = np.percentile(values, list(PERCENTILES.values())).tolist()
            summary |= {f"{self._prefix}_{name}_{label}": value for label, value in zip(PERCENTILES, at, strict=True)}
        return summary
