"""What large populations and cohorts cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from support import CLASSES, FEATURES, learner
import shoal

clients, cohort, engine = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rng = np.random.default_rng(0)
inputs = rng.normal(size=(200_000, FEATURES)).astype(np.float32)
data = shoal.data.ArrayDataset(inputs, rng.integers(CLASSES, size=200_000), classes=CLASSES)
population = shoal.data.partition(data, shoal.data.Dirichlet(clients=clients, alpha=0.3))
if engine == "vectorized":
    engine = shoal.engines.VectorizedEngine(block_size=10)
settings = {"cohort": cohort, "client_validation": 0.2, "engine": engine, "run_dir": sys.argv[4]}
shoal.federate(learner(steps=2), population, rounds=3, **settings)
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def peak(engine, clients, cohort, folder):
    """Returns the most memory that a run took, in kB."""
    words = [sys.executable, "-c", CODE, str(clients), str(cohort), engine, str(folder)]
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "few", "many"),
    [
        ("auto", 1_000, 100_000),
        ("sequential", 100, 10_000),
        ("vectorized", 100, 10_000),
        ("process", 100, 10_000),
        ("distributed", 100, 10_000),
    ],
)
def test_many_clients_take_no_more_memory_than_few(engine, few, many, tmp_path):
    less, more = (peak(engine, clients, 10, tmp_path / str(clients)) for clients in (few, many))
    assert more <= 1.05 * less, f"{less} kB with {few:,} clients, {more} kB with {many:,}"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_large_cohort_takes_no_more_memory_than_a_small_one(engine, tmp_path):
    less, more = (peak(engine, 5_000, cohort, tmp_path / str(cohort)) for cohort in (20, 1_000))
    assert more <= 1.05 * less, f"{less} kB with 20 clients a round, {more} kB with 1,000"
