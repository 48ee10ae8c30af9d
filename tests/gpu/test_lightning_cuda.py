"""Lightning's own ``strategy="fsdp"``, which it gives CUDA devices alone; skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

import lightning_ranks
import shoal
from lightning_modules import Scheduled, fit
from lightning_ranks import Deep
from shoal.types import LocalObjective
from support import assert_equal, samples

TESTS = Path(__file__).parents[1]
CPU, CUDA = ({"accelerator": name, "devices": 1} for name in ("cpu", "cuda"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def lightning(options, **settings):
    return shoal.LightningLearner(partial(Scheduled, Deep), trainer=options, batch_size=8, **settings)


def on_cpu(tree):
    return {name: array.cpu() for name, array in tree.items()}


@pytest.mark.parametrize("kind", ["plain", "correction"])
def test_fsdp_on_one_device_is_the_cpu(kind):
    correction = {name: torch.full_like(p, 0.03) for name, p in lightning(CPU).init(0).params.items()}
    terms = LocalObjective(proximal=0.2, correction=correction) if kind == "correction" else LocalObjective()
    ours = fit(lightning(CUDA | {"strategy": "fsdp"}), objective=terms)
    assert_equal(on_cpu(ours.delta), dict(fit(lightning(CPU), objective=terms).delta), atol=1e-3)


def test_fsdp_on_one_device_goes_on_with_its_optimizer():
    found = []
    for options in (CPU, CUDA | {"strategy": "fsdp"}):
        ours = lightning(options, keep_optimizer=True)
        fit(ours)
        found.append((on_cpu(fit(ours, seed=2).delta), on_cpu(ours.carried()[0])))
    for tree, other in zip(*found, strict=True):
        assert_equal(tree, other, atol=1e-3)


def test_16_bits_are_near():
    ours = fit(lightning(CUDA | {"strategy": "fsdp", "precision": "bf16-mixed"}))
    assert_equal(on_cpu(ours.delta), dict(fit(lightning(CPU)).delta), atol=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_are_one_with_twice_the_batch_size(tmp_path, strategy):
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [sys.executable, *words, __file__, tmp_path, strategy],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == other
    expected = shoal.train(lightning(CPU), samples(37), epochs=2, evaluate=samples(23, seed=5))
    found = {name: torch.tensor(array, dtype=torch.float64) for name, array in first.items()}
    assert_equal(found, {name: array.double() for name, array in expected.last_params.items()}, atol=1e-3)


def main():
    """Trains as one of two ranks, and writes the parameters."""
    folder, strategy = Path(sys.argv[1]), sys.argv[2]
    learner = shoal.LightningLearner(partial(Scheduled, Deep), batch_size=4)
    devices = shoal.Devices(strategy, count=2, accelerator="cuda")
    result = shoal.train(learner, samples(37), devices=devices, epochs=2, evaluate=samples(23, seed=5))
    text = json.dumps(lightning_ranks.listed({name: array.cpu() for name, array in result.last_params.items()}))
    (folder / f"rank-{os.environ['RANK']}.json").write_text(text)


if __name__ == "__main__":
    main()
