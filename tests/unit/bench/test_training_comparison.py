"""benchmarks/training.py compares two loops that do the same work."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import shoal
from shoal.bench.models import MODELS, random_samples
from support import assert_equal

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "training.py"


def test_both_loops_make_the_same_model():
    """With all samples in one batch their order makes no difference."""
    script, kind, data = runpy.run_path(str(SCRIPT)), MODELS["har"], random_samples(MODELS["har"], 16)
    learner = shoal.TorchLearner(
        kind.make,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=script["LEARNING_RATE"]),
        batch_size=16,
        devices=shoal.Devices(accelerator="cpu", threads=1),
    )
    with learner.training(data, epochs=3, seed=0) as ongoing:
        own = kind.make()
        own.load_state_dict(learner.state_dict(ongoing.model()))
        inputs, targets = torch.from_numpy(data.inputs), torch.from_numpy(data.targets())
        script["OwnLoop"](own, inputs, targets, 16, "fp32").block(3)
        while ongoing.step < 3:
            ongoing.advance(3)
        trained = learner.state_dict(ongoing.model())
    assert_equal(dict(own.state_dict()), trained, atol=1e-6)
    assert max(float(tensor.grad.abs().max()) for tensor in own.parameters()) > 1e-4


def test_one_rank_prints_every_turn():
    words = ["--model", "logistic", "--turns", "3", "--steps", "2", "--batch-size", "8"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["ratios"]) == len(found["cpu_ratios"]) == 3
    assert found["own"] > 0
    assert found["shoal"] > 0


@pytest.mark.slow
def test_the_memory_of_each_is_that_of_a_process_of_its_own():
    words = ["--model", "logistic", "--steps", "2", "--batch-size", "8", "--alone"]
    peaks = []
    for which in ("own", "shoal"):
        done = subprocess.run([sys.executable, SCRIPT, *words, which], capture_output=True, text=True, timeout=120)
        peaks.append(json.loads(done.stdout)["peak"])
    assert min(peaks) > 2**26
    assert max(peaks) < 1.2 * min(peaks)
