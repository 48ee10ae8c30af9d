"""A rank of a site whose script makes a ``MultiWorkerMirroredStrategy``: TensorFlow is told its place."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from shoal.devices import REUSE_PORT, TF_CONFIG, WORKERS, tensorflow_config


def main(command: Sequence[str]) -> None:
    """Becomes the script: ``python -m shoal.sites.tensorflow_worker COMMAND …``."""
    os.environ[TF_CONFIG] = tensorflow_config(os.environ[WORKERS].split(","), int(os.environ["RANK"]))
    os.environ[REUSE_PORT] = "true"  # the site's launcher holds the ports
    os.execvp(command[0], list(command))  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
