from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import shoal
from shoal.engines import choose_engine
from shoal.errors import ConfigurationError
from support import learner, population

CODE = """
import sys
import numpy as np
import shoal
from support import BatchNormNet, learner, population
from shoal.types import Broadcast

ours = learner(BatchNormNet, clip_norm=1.0, devices=shoal.Devices("single", accelerator="cpu"))
broadcast = Broadcast(round=1, model=ours.init(0))
again = ours.on(ours.devices)
again.preload()
before = set(sys.modules)
again.fit(broadcast, population()[0], np.random.default_rng(0))
print(sorted(set(sys.modules) - before))
"""


def test_the_first_fit_has_nothing_left_to_import():
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.fixture
def cuda(monkeypatch):
    """A torch that was built with CUDA, and fails the test if it is asked for anything."""

    def touched(*_):
        raise AssertionError("CUDA was touched")

    for name in ("is_available", "current_device", "init", "_lazy_init", "mem_get_info", "device_count"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    return monkeypatch


@pytest.mark.parametrize("accelerator", ["auto", "cuda", "cpu"])
def test_it_leaves_cuda_alone(accelerator, cuda):
    ours = learner(devices=shoal.Devices(accelerator=accelerator))
    ours.preload()
    assert ("resident" in ours.__dict__) == (accelerator == "cpu")


def test_cuda_that_was_in_use_before_is_said_when_the_engine_opens(cuda):
    cuda.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    cuda.setattr(torch.cuda, "device_count", lambda: 1)
    for accelerator in ("auto", "cuda"):
        with pytest.raises(
            ConfigurationError,
            match=r"engine 'process' cannot run here: CUDA was already in use in this process.*: open the engine",
        ):
            choose_engine("process", learner(devices=shoal.Devices(accelerator=accelerator)), population())


def test_where_there_is_no_device_a_look_for_one_did_no_harm(cuda):
    cuda.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    cuda.setattr(torch.cuda, "device_count", lambda: 0)
    ours = learner()
    ours.preload()
    assert "resident" not in ours.__dict__  # the child looks again
