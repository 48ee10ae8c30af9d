"""What a large population costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from support import CLASSES, FEATURES, learner
import shoal

clients = int(sys.argv[1])
rng = np.random.default_rng(0)
inputs = rng.normal(size=(200_000, FEATURES)).astype(np.float32)
data = shoal.data.ArrayDataset(inputs, rng.integers(CLASSES, size=200_000), classes=CLASSES)
population = shoal.data.partition(data, shoal.data.Dirichlet(clients=clients, alpha=0.3))
shoal.federate(learner(steps=2), population, rounds=3, cohort=10, run_dir=sys.argv[2], client_validation=0.2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_100_000_clients_take_no_more_memory_than_1_000(tmp_path):
    def peak(clients):
        words = [sys.executable, "-c", CODE, str(clients), str(tmp_path / str(clients))]
        environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    few, many = peak(1_000), peak(100_000)
    assert many <= 1.05 * few, f"{few} kB with 1,000 clients, {many} kB with 100,000"
