"""The CPU cores of this machine, divided among processes that compute side by side."""

from __future__ import annotations

import os

THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
"""The environment variables with the number of threads that an operation of torch or TensorFlow may use."""


def cores_each(processes: int) -> int:
    """Returns how many of the cores that this process may use each of several processes has, at least 1."""
    return max(len(os.sched_getaffinity(0)) // processes, 1)
