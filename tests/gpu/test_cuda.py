"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

import shoal
from shoal.learners.torch_devices import computing, resolve
from shoal.runs import Checkpoints
from shoal.types import Broadcast
from support import BatchNormNet, Mlp, assert_equal, learner, population, samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CUDA, CPU = shoal.Devices(accelerator="cuda"), shoal.Devices(accelerator="cpu")


class ConvNet(torch.nn.Sequential):
    def __init__(self):
        super().__init__(
            torch.nn.Unflatten(1, (1, 2, 3)),
            torch.nn.Conv2d(1, 8, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(48, 3),
        )


def federate(model, devices, **settings):
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    made = learner(model, optimizer=momentum, devices=devices)
    return shoal.federate(made, population(), rounds=3, cohort=3, evaluate=samples(50, seed=9), **settings)


def test_auto_means_cuda_and_ids_are_checked():
    assert resolve(shoal.Devices()).type == "cuda"
    with pytest.raises(shoal.errors.ConfigurationError, match="CUDA device 99 was asked for, but there"):
        resolve(shoal.Devices(id=99))


@pytest.mark.parametrize("model", [Mlp, ConvNet])
def test_it_starts_where_the_cpu_does_and_ends_close_by(model):
    on_cuda, on_cpu = learner(model, devices=CUDA).init(7), learner(model, devices=CPU).init(7)
    assert {p.device.type for p in on_cuda.params.values()} == {"cuda"}
    assert_equal({name: p.cpu() for name, p in on_cuda.params.items()}, dict(on_cpu.params))
    found, expected = federate(model, CUDA), federate(model, CPU)
    assert_equal({name: p.cpu() for name, p in found.params.items()}, dict(expected.params), atol=1e-4)


@pytest.mark.parametrize("model", [BatchNormNet, ConvNet])
def test_the_same_seed_gives_the_same_bits_twice(model):
    assert_equal(federate(model, CUDA).params, federate(model, CUDA).params)


def test_the_users_generator_and_kernels_come_back():
    before = torch.cuda.get_rng_state(), torch.backends.cudnn.deterministic
    federate(BatchNormNet, CUDA)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    with computing(torch.device("cuda", 0), None):
        assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.deterministic == before[1]


def test_the_server_stays_on_the_device_and_a_resume_goes_back_to_it(tmp_path):
    settings = {"run_dir": tmp_path / "run", "algorithm": shoal.FedAdam(), "tensorboard": False}
    first = federate(BatchNormNet, CUDA, **settings)
    assert {p.device.type for p in first.last_params.values()} == {"cuda"}
    again = federate(BatchNormNet, CUDA, resume=True, **settings)
    assert {p.device.type for p in again.last_params.values()} == {"cuda"}
    assert_equal(again.last_params, first.last_params)
    saved = Checkpoints(tmp_path / "run/checkpoints", keep=3).load_latest().tensors
    assert {tensor.device.type for tensor in saved.values()} == {"cpu"}


def test_memory_does_not_grow_from_client_to_client():
    made = learner(Mlp, devices=CUDA)
    broadcast = Broadcast(round=1, model=made.init(0))
    clients = population((9,) * 40)

    def held(client):
        made.fit(broadcast, clients[client], np.random.default_rng(client))
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    after = [held(client) for client in range(40)]
    assert after[-1] <= after[1]


# In processes of their own, because this one has touched CUDA.
PROCESS = """
import sys
import shoal, torch
from shoal.types import Broadcast
from support import Mlp, assert_equal, learner, population, tasks

ours, clients = learner(Mlp, devices=shoal.Devices(accelerator="cuda")), population()
if sys.argv[1] == "before":
    torch.cuda.is_available()
engine = shoal.engines.ProcessEngine(max_concurrent=2)
engine.open(ours, clients)
broadcast = Broadcast(round=1, model=ours.init(0))
free = []
for _ in range(3):
    found = list(engine.run(ours, broadcast, tasks(clients, range(5))))
    assert not [result.error for result in found if result.error], found
    torch.cuda.synchronize()
    free.append(torch.cuda.mem_get_info()[0])
engine.close()
assert free[0] == free[1] == free[2], free
for result, expected in zip(found, shoal.engines.SequentialEngine().run(ours, broadcast, tasks(clients, range(5)))):
    assert {p.device.type for p in result.update.delta.values()} == {"cuda"}
    assert_equal(result.update.delta, expected.update.delta)
print("equal")
"""


def process(when):
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    words = [sys.executable, "-c", PROCESS, when]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


def test_children_equal_the_sequential_engine_and_give_the_devices_memory_back():
    done = process("after")
    assert done.stdout == "equal\n", done.stderr


def test_cuda_that_was_touched_before_is_refused():
    assert "CUDA was already in use in this process" in process("before").stderr
