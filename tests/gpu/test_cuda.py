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
from models import MODELS, images
from shoal.bench import simulate
from shoal.learners.torch_devices import computing, resolve
from shoal.learners.torch_graphs import CudaGraphs
from shoal.runs import Checkpoints
from shoal.types import Broadcast, LocalObjective, ModelState
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
        resolve(shoal.Devices(ids=[99]))


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


def blocks_in_both_ways(ours, clients, *, rounds=6):
    """Asserts that blocks of two sizes end with the same bits when they are replayed; returns the trainer."""
    start, trainer = ours.init(0), ours.stacked(clients.dataset)
    variants = trainer.equal_variants
    assert variants == ("grouped", "grouped, recorded")
    for round in range(1, rounds + 1):
        moved = ModelState(
            params={name: array * (1 + 0.01 * round) for name, array in start.params.items()},
            buffers=start.buffers,
            constants=start.constants,
        )
        broadcast = Broadcast(round=round, model=moved, objective=LocalObjective(proximal=0.1))
        for rows in (range(20), range(20, 25)):
            ends = []
            for variant in variants:
                block = [(clients[k], np.random.default_rng([round, k])) for k in rows]
                update = trainer.fit(broadcast, block, variant)
                told = {"delta": update.delta, "buffers": update.buffers, "metrics": update.metrics}
                ends.append(shoal.trees.copy(shoal.trees.flatten(told)))
            assert_equal(ends[1], ends[0])
    return trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("model", ["cnn", "batch_norm", "transformer"])
def test_a_recorded_block_ends_with_the_bits_of_the_block_itself(model, optimizer, precision, caplog):
    devices = shoal.Devices(accelerator="cuda", precision=precision)
    ours = learner(MODELS[model], optimizer=partial(optimizer, lr=0.01), devices=devices, epochs=2)
    trainer = blocks_in_both_ways(ours, images((9,) * 25))
    assert caplog.text == ""
    assert len(trainer._recorded) == 2
    trainer.synchronize()
    held = torch.cuda.memory_allocated()
    trainer.settle("grouped")
    assert torch.cuda.memory_allocated() < held


def test_a_block_that_copies_from_the_host_is_not_recorded_and_says_so(caplog):
    ours = learner(Mlp, devices=CUDA, transform=lambda inputs: inputs + torch.ones(1).to(inputs.device))
    trainer = blocks_in_both_ways(ours, population((8,) * 25))
    assert "a step of it waits for the device, or copies from the host" in caplog.text
    assert trainer.variants == ("grouped",)


def active_bytes():
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["active_bytes.all.current"]


def test_a_capture_that_breaks_leaves_the_stream_the_generator_and_the_memory_as_they_were():
    device = torch.device("cuda", torch.cuda.current_device())
    recorder, stream = CudaGraphs(device), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        recorder.record(lambda: {"sum": torch.full((1,), torch.ones(9, device=device).sum().item())})
    assert torch.cuda.current_stream() == stream
    torch.nn.functional.dropout(torch.ones(9, device=device))  # draws
    before = active_bytes()
    for _ in range(3):
        used = torch.ones(2**20, device=device)
        used.record_stream(recorder._stream)
        del used
        torch.cuda.synchronize()
    assert active_bytes() <= before + 2**20 * 4  # the last one may still wait
    recorded = recorder.record(lambda: {"one": torch.ones(1, device=device)})
    recorded.replay()
    assert recorded.results["one"].item() == 1.0


@pytest.mark.parametrize("model", ["lenet", "resnet18gn", "transformer"])
def test_a_bench_tries_recorded_blocks_and_says_which_it_chose(model, caplog, record_property):
    engine = shoal.engines.VectorizedEngine()
    simulate(model, population=200, cohort=100, rounds=2, engine=engine, devices=CUDA)
    assert "not recorded" not in caplog.text
    assert engine.settled
    record_property("variant", engine.found_variant)
    print(f"{model}: blocks of {engine.found_block_size}, {engine.found_variant}")


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
