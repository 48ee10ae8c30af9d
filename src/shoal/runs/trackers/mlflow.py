"""MLflow."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from shoal.description import flat
from shoal.runs.folder import RunData
from shoal.runs.trackers.process import Ending
from shoal.version import __version__

KEY, VALUE = 250, 500
"""Characters that every MLflow takes in the name of a parameter or metric, and in a parameter."""

METRICS, PARAMS = 1000, 100
"""How many of them it takes at once."""

STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
"""MLflow's words for how a run ended."""

T = TypeVar("T")


class MlflowTracker:
    """Writes to ``$MLFLOW_TRACKING_URI``, else to ``mlflow/mlflow.db`` in the run's folder, without a server.

    The run's name is its folder's, and ``$MLFLOW_EXPERIMENT_NAME`` or the configuration's name is the experiment.
    Parameters are the flat configuration, cut to 500 characters; MLflow does not change a parameter, so that those
    of a resumed run are its first part's. NaN stays NaN, and what was infinite is NaN too.

    A resumed run goes on with the same MLflow run, and what that has already is not written again: rounds between the
    checkpoint and the crash keep the values of the first time, which only in measured times differ from the second.

    Args:
        run: The run.
        known: What was remembered of it: ``id``, and under ``place`` a digest of the address, or nothing.
    """

    lasting = True

    def __init__(self, run: RunData, known: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        folder = run.path.resolve() / "mlflow"
        place = hashlib.sha256((uri or "").encode()).hexdigest()[:16]  # it may hold a password
        if not uri and not known:  # one that a killed process has begun can be of no use
            (folder / "mlflow.db").unlink(missing_ok=True)
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        if known.get("place") == place:
            self._id = str(known["id"])
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._create(run, None if uri else (folder / "artifacts").as_uri())
        self.known = {"id": self._id, "place": place}

    def describe(self, config: Mapping[str, Any]) -> None:
        """Takes the configuration."""
        from mlflow.entities import Param

        there = self._client.get_run(self._id).data.params
        wanted = {_key(name): str(value)[:VALUE] for name, value in flat(config).items()}
        for part in _parts([Param(key, value) for key, value in wanted.items() if key not in there], PARAMS):
            self._client.log_batch(self._id, params=part)

    def log(self, number: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one round or epoch, which is their step."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        found = [Metric(_key(name), value, now, number) for name, value in metrics.items()]
        for part in _parts(found, METRICS):
            self._client.log_batch(self._id, metrics=part)

    def close(self, ending: Ending) -> None:
        """Says how the run ended."""
        self._client.set_terminated(self._id, STATUS[ending])

    def _create(self, run: RunData, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        own = str(run.config.get("identity", {}).get("name") or run.name)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or own
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                number = self._client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:  # unless another run has made it in the meantime
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment is not None:
            number = experiment.experiment_id
        tags = {"shoal.name": own, "shoal.folder": str(run.path), "shoal.version": __version__}
        return str(self._client.create_run(number, run_name=run.name, tags=tags).info.run_id)


def _key(name: str) -> str:
    """Returns a name as MLflow takes it."""
    return re.sub(r"[^/\w.\- :]", "_", name)[:KEY]


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
