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

clients, engine = int(sys.argv[1]), sys.argv[3]
rng = np.random.default_rng(0)
inputs = rng.normal(size=(200_000, FEATURES)).astype(np.float32)
data = shoal.data.ArrayDataset(inputs, rng.integers(CLASSES, size=200_000), classes=CLASSES)
population = shoal.data.partition(data, shoal.data.Dirichlet(clients=clients, alpha=0.3))
settings = {"cohort": 10, "client_validation": 0.2, "engine": engine, "run_dir": sys.argv[2]}
shoal.federate(learner(steps=2), population, rounds=3, **settings)
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "few", "many"), [("auto", 1_000, 100_000), ("process", 100, 10_000)])
def test_many_clients_take_no_more_memory_than_few(engine, few, many, tmp_path):
    def peak(clients):
        words = [sys.executable, "-c", CODE, str(clients), str(tmp_path / str(clients)), engine]
        environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    less, more = peak(few), peak(many)
    assert more <= 1.05 * less, f"{less} kB with {few:,} clients, {more} kB with {many:,}"
