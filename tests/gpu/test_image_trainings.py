"""The trainings on images on GPUs: DataParallel, and NCCL between two nodes; skipped where there are none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pictures import EXAMPLE, assert_same, records, write_clothes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")

SHORT = ("-e", "2", "-bs", "30", "-lr", "2e-5", "--no-augment", "--accelerator", "cuda", "--run-dir")


def run(folder, *words, **environment):
    """Runs a script on small data; returns what it has shown."""
    kept = {name: value for name, value in os.environ.items() if name not in {"MASTER_ADDR", "NODE_RANK"}}
    done = subprocess.run(
        words, cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory):
    """A folder with the data, and the run of one GPU without a launcher."""
    folder = tmp_path_factory.mktemp("images")
    write_clothes(folder)
    run(folder, sys.executable, EXAMPLE / "train_torch_ddp.py", ".", *SHORT, "one")
    return folder


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=two_gpus)])
def test_data_parallel_equals_one_gpu(one_gpu, count):
    told = run(one_gpu, sys.executable, EXAMPLE / "train_torch_dp.py", ".", "-n", str(count), *SHORT, f"dp{count}")
    assert_same(one_gpu / f"dp{count}", one_gpu / "one", atol=1e-5)
    assert "= 30 a step (dp, fp32)" in told


@two_gpus
def test_two_nodes_equal_one_gpu(one_gpu):
    told = run(one_gpu, EXAMPLE / "run_torch_ddp.sh", ".", *SHORT, "two", PYTHON=sys.executable, NPROC="1")
    assert_same(one_gpu / "two", one_gpu / "one", atol=1e-5)
    assert "batch: 15 examples a device × 2 devices = 30 a step (ddp, fp32)" in told


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_learn_with_augmentation(one_gpu, precision):
    words = ("-e", "20", "-bs", "20", "--precision", precision, "--run-dir", precision)
    run(one_gpu, sys.executable, EXAMPLE / "train_torch_ddp.py", ".", *words)
    losses = [line["train_loss"] for line in records(one_gpu / precision)]
    assert losses[-1] < 0.8 * losses[0]
