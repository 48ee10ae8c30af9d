from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shoal.client.task import Task
from shoal.errors import ConfigurationError
from shoal.learners.script import ScriptLearner
from shoal.learners.torch_model import ObjectiveGradient, ResidentModel
from shoal.processes.tensors import TensorFile
from shoal.sites.task import SiteTask
from shoal.types import Broadcast, LocalObjective, ModelState
from support import BatchNormNet, Mlp, assert_equal


class Sent:
    """In the place of a link: keeps what is replied."""

    rank = 0

    def __init__(self):
        self.told = []

    def reply(self, told, fd):
        self.told.append(told)
        with TensorFile(os.dup(fd)) as file:
            self.arrays = {name: file.read(name) for name in file.entries}


class Tied(nn.Module):
    """Has one weight under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight


def made(module, *, objective=None, link=None, kind="train"):
    """Returns a task with the model of such a module, as a site has it."""
    learner = ScriptLearner(Path(__file__), module)
    model = learner.init(3)
    broadcast = Broadcast(round=2, model=model, objective=objective or LocalObjective())
    work = SiteTask(kind, broadcast, ties=learner.ties(model), seed=0)
    return Task(
        kind=kind, round=2, rounds=5, site="a", model=model, objective=broadcast.objective,
        _ties=work.message(0)["ties"], _link=link,
    )  # fmt: skip


@pytest.mark.parametrize("module", [Mlp, BatchNormNet, Tied])
@pytest.mark.parametrize("wrapped", [lambda own: own, lambda own: torch.compile(own, backend="eager"), nn.DataParallel])
def test_a_module_takes_the_global_model(module, wrapped):
    task, own = made(module), module()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.fill_(7)
    task.load(wrapped(own))
    assert_equal(own.state_dict(), task.params)
    assert task.params.keys() == own.state_dict().keys()


def test_a_model_of_both_wrappers_is_taken_too():
    task, own = made(Mlp), Mlp()
    task.load(nn.DataParallel(torch.compile(own, backend="eager")))
    assert_equal(own.state_dict(), task.params)


def test_what_is_loaded_is_a_copy():
    task, own = made(Mlp), Mlp()
    before = {name: tensor.clone() for name, tensor in task.params.items()}
    task.load(own)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(1)
    assert_equal(task.params, before)


def test_another_model_is_refused():
    with pytest.raises(ConfigurationError, match="it has 0.bias, 0.weight, 2.bias and lacks bias, weight"):
        made(Mlp).load(nn.Linear(2, 2))
    with pytest.raises((ConfigurationError, RuntimeError), match="2.weight"):
        made(Mlp).load(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)))


@pytest.mark.parametrize(("proximal", "corrected"), [(0.3, False), (0.0, True), (0.7, True), (0.0, False)])
@pytest.mark.parametrize("wrapped", [lambda own: own, nn.DataParallel])
def test_the_objective_has_the_learners_gradient(proximal, corrected, wrapped):
    names = dict(Mlp().named_parameters())
    noise = torch.Generator().manual_seed(1)
    correction = {name: torch.randn(one.shape, generator=noise) for name, one in names.items()} if corrected else None
    task = made(Mlp, objective=LocalObjective(proximal=proximal, correction=correction))
    inputs, targets = torch.randn(5, 6, generator=noise), torch.arange(5) % 3
    moved = {name: tensor + 0.1 for name, tensor in task.params.items()}

    own = Mlp()
    own.load_state_dict(moved)
    module = wrapped(own)
    loss = F.cross_entropy(own(inputs), targets)
    whole = task.apply(loss, module)
    assert (whole is loss) == (not proximal and not corrected)
    whole.backward()

    resident = ResidentModel(Mlp, torch.device("cpu"), 0)
    resident.load(ModelState(params=moved))
    F.cross_entropy(resident.module(inputs), targets).backward()
    ObjectiveGradient(task.broadcast, resident, dict(resident.module.named_parameters())).add()
    theirs = dict(resident.module.named_parameters())
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-6)


def test_frozen_parameters_have_no_objective():
    own = Mlp()
    own[0].weight.requires_grad_(False)
    task = made(lambda: own, objective=LocalObjective(proximal=1.0))
    assert "0.weight" in task.model.constants
    task.load(own)
    task.apply(torch.zeros(()), own).backward()
    assert own[0].weight.grad is None


@pytest.mark.parametrize("module", [Mlp, BatchNormNet, Tied])
@pytest.mark.parametrize("wrapped", [lambda own: own, nn.DataParallel])
def test_a_reply_has_what_the_server_needs(module, wrapped):
    link = Sent()
    task, own = made(module, link=link), module()
    task.reply(params=wrapped(own).state_dict(), examples=3, metrics={"loss": torch.tensor(0.5), "acc": np.float32(1)})
    assert [told.pop("seconds") >= 0 for told in link.told] == [True]
    assert link.told == [{"task": 0, "examples": 3.0, "metrics": {"loss": 0.5, "acc": 1.0}, "tree": "params"}]
    assert_equal(link.arrays, {name: own.state_dict()[name] for name in {**task.model.params, **task.model.buffers}})


def test_a_reply_may_be_a_difference():
    link = Sent()
    task = made(BatchNormNet, link=link)
    task.reply(delta=task.model.params, examples=1)
    assert link.arrays.keys() == task.model.params.keys()
    task.replied = False
    task.reply(delta=task.model.params, buffers=task.model.buffers, examples=1)
    assert link.arrays.keys() == task.model.params.keys() | task.model.buffers.keys()
    assert [told["tree"] for told in link.told] == ["delta", "delta"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": None}, "a reply has examples > 0, the site's weight, not None"),
        ({"examples": 0}, "not 0"),
        ({"examples": -1}, "not -1"),
        ({"examples": float("nan")}, "not nan"),
        ({"params": None}, "either params=… or delta=…"),
        ({"delta": {}}, "either params=… or delta=…"),
        ({"params": {"0.weight": torch.ones(1)}}, "the reply lacks 0.bias, 2.weight, 2.bias: reply with all"),
        ({"metrics": {"loss": "low"}}, "metric loss must be one number, not 'low'"),
        ({"metrics": {"loss": torch.ones(2)}}, "metric loss must be one number"),
        ({"metrics": {"loss": None}}, "metric loss must be one number, not None"),
    ],
)
def test_a_reply_that_is_not_whole_is_refused(settings, message):
    link = Sent()
    task = made(Mlp, link=link)
    with pytest.raises(ConfigurationError, match=message):
        task.reply(**{"params": task.params, "examples": 1} | settings)
    assert not link.told
    task.reply(params=task.params, examples=1)
    assert len(link.told) == 1


def test_one_reply_for_each_task():
    task = made(Mlp, link=Sent())
    task.reply(params=task.params, examples=1)
    with pytest.raises(ConfigurationError, match="the task to train in round 2 was replied to already: one reply"):
        task.reply(params=task.params, examples=1)


def test_other_ranks_may_reply_and_nothing_happens():
    link = Sent()
    link.rank = 1
    task = made(Mlp, link=link)
    task.reply(params=task.params, examples=1)
    assert not link.told
    assert task.replied


def test_seeds_differ_by_round_and_site_and_nothing_else():
    def seed(**more):
        return Task(kind="train", rounds=9, model=ModelState(params={}), site="a", **{"round": 1, **more}).seed

    assert seed() == seed(number=4)
    assert len({seed(), seed(round=2), seed(client=1), seed(run_seed=1)}) == 4
