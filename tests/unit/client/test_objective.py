"""What a script adds to its loss where parameters are divided among the ranks, and a reply that was refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shoal.client import Task
from shoal.errors import ConfigurationError
from shoal.types import LocalObjective, ModelState


@pytest.fixture
def mesh():
    """A mesh of this process alone, on which parameters are divided as on any other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def task_of(net):
    """A task with both terms, whose global model is not the net."""
    start = {name: array.detach() + 0.5 for name, array in net.state_dict().items()}
    correction = {name: torch.ones_like(array) for name, array in start.items()}
    objective = LocalObjective(proximal=0.3, correction=correction)
    return Task(kind="train", round=1, rounds=1, site="local", objective=objective, model=ModelState(params=start))


def gradients(net, task, inputs):
    task.apply(net(inputs).pow(2).mean(), net).backward()
    return [getattr(each.grad, "full_tensor", lambda own=each.grad: own)() for each in net.parameters()]


@pytest.mark.parametrize("units", ["one", "each layer"])
def test_the_local_objective_of_divided_parameters_is_that_of_whole_ones(mesh, units):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    task, inputs = task_of(net), torch.randn(6, 4)
    whole = gradients(copy.deepcopy(net), task, inputs)
    if units == "each layer":
        for layer in (net[0], net[2]):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for own, expected in zip(gradients(net, task, inputs), whole, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)


def test_a_reply_that_was_refused_can_be_given_again_as_it_should_be():
    class Link:
        rank, replies = 0, 0

        def reply(self, told, fd):
            self.replies += 1

    net = nn.Linear(2, 1)
    link = Link()
    task = Task(kind="train", round=1, rounds=1, site="a", model=ModelState(params=net.state_dict()), _link=link)
    with pytest.raises(ConfigurationError, match="lacks bias"):
        task.reply(params={"weight": net.weight.detach()}, examples=1)
    task.reply(params=net.state_dict(), examples=1)
    assert link.replies == 1
    with pytest.raises(ConfigurationError, match="already"):
        task.reply(params=net.state_dict(), examples=1)
