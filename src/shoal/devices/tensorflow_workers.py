"""How the workers of TensorFlow's ``MultiWorkerMirroredStrategy`` learn of each other."""

from __future__ import annotations

import json
from collections.abc import Sequence

WORKERS = "SHOAL_WORKERS"
"""The environment variable with the addresses of all workers, ``host:port`` by rank, separated by commas."""

TF_CONFIG = "TF_CONFIG"
"""The environment variable in which TensorFlow looks for them, and for which of them it is."""

REUSE_PORT = "TF_GRPC_REUSE_PORT"
"""The environment variable that, being ``true``, lets TensorFlow listen at a port which others share."""


def tensorflow_config(workers: Sequence[str], index: int) -> str:
    """Returns what TensorFlow wants to find there.

    Args:
        workers: Their addresses; the first one is the chief.
        index: Which one the process is.
    """
    return json.dumps({"cluster": {"worker": list(workers)}, "task": {"type": "worker", "index": index}})
