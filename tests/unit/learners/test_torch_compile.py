from __future__ import annotations

import os
import shutil
from functools import partial

import pytest
import torch
import torch._inductor.config as inductor

import shoal
from models import batch_norm, images
from shoal.engines import choose_engine
from shoal.errors import CannotStackError, ConfigurationError
from support import Mlp, assert_equal, learner, population, samples

# What torch's compiler says of torch as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(autouse=True)
def forget():
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """Lets torch trace graphs and run them as they are, which takes no compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def assert_the_same_both_ways(model, clients):
    settings = {"rounds": 2, "evaluate": clients.dataset, "engine": "sequential"}
    made = [learner(model, compile=compiles, train_metrics=True) for compiles in (True, False)]
    found, expected = (shoal.federate(ours, clients, **settings) for ours in made)
    assert_equal(found.params, expected.params, atol=1e-5)
    for name in ("loss", "accuracy", "train_loss"):
        assert [r[name] for r in found.history] == pytest.approx([r[name] for r in expected.history], rel=1e-5)
    start = made[1].init(0)
    assert made[0].state_dict(start).keys() == made[1].state_dict(start).keys() == model().state_dict().keys()


@pytest.mark.parametrize(("model", "sizes"), [(Mlp, (7, 12, 5)), (batch_norm, (8, 10))])
def test_a_compiled_model_trains_to_the_same_numbers_under_the_same_names(model, sizes, traced):
    assert_the_same_both_ways(model, images(sizes) if model is batch_norm else population(sizes))


@pytest.mark.slow
@pytest.mark.skipif(compiler is None, reason="there is no C++ compiler")
def test_torchs_own_compiler_comes_to_the_same_numbers():
    with inductor.patch(compile_threads=1):  # and leaves no processes
        assert_the_same_both_ways(Mlp, population((7, 12, 5)))


def test_checking_training_and_evaluation_all_call_what_is_compiled(monkeypatch):
    calls = []

    def counting(module):
        return lambda inputs: calls.append((module.training, torch.is_grad_enabled())) or module(inputs)

    monkeypatch.setattr("shoal.learners.torch_model.compiled", counting)
    ours, clients = learner(compile=True, batch_size=None), population((8,))
    before = ours.resident.state()
    ours.check(clients.dataset)
    assert_equal(ours.resident.state().merged(), before.merged())
    assert all(parameter.grad is None for parameter in ours.resident.params.values())
    shoal.federate(ours, clients, rounds=1, evaluate=clients.dataset)
    assert (True, True) in calls[1:]
    assert (False, False) in calls
    calls.clear()
    shoal.federate(learner(), clients, rounds=1)
    assert calls == []


class Branches(Mlp):
    def forward(self, inputs):
        return super().forward(inputs) if inputs.sum() > 0 else super().forward(-inputs)


def test_a_model_that_is_not_one_graph_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot compile Branches: Data-dependent branching; change the model"):
        shoal.federate(learner(Branches, compile=True), population(), rounds=1, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        inductor.patch({"cpp.cxx": (None, str(tmp_path / "none"))}),
        pytest.raises(ConfigurationError, match="No working C\\+\\+ compiler found.*; .*or leave compile out"),
    ):
        shoal.federate(learner(compile=True), population(), rounds=1)


def test_clients_of_a_compiled_model_are_not_stacked():
    ours, clients = learner(compile=True), population((8,) * 4)
    with pytest.raises(CannotStackError, match="compiles the model of one client"):
        ours.stacked(clients.dataset)
    with pytest.raises(ConfigurationError, match="cannot hold this learner: compile=True"):
        choose_engine("vectorized", ours, clients)
    engine, line = choose_engine("auto", ours, clients)
    assert (engine.name, line) == (
        "sequential",
        "engine sequential: compile=True compiles the model of one client, not of many at once",
    )


def trained(*, compiles, strategy="single"):
    devices = shoal.Devices(strategy, accelerator="cpu")
    return shoal.train(
        learner(Mlp, compile=compiles, devices=devices), samples(30), epochs=2, evaluate=samples(9, seed=1)
    )


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_a_training_on_one_device_or_on_ranks_calls_what_is_compiled(traced, strategy, monkeypatch):
    calls, compile_ = [], torch.compile

    def counting(*given, **how):
        run = compile_(*given, **how)
        return lambda inputs: calls.append(torch.is_grad_enabled()) or run(inputs)

    monkeypatch.setattr(torch, "compile", counting)
    found, expected = trained(compiles=True, strategy=strategy), trained(compiles=False, strategy=strategy)
    assert set(calls) == {True, False}  # in training and in evaluation
    assert_equal(found.params, expected.params, atol=1e-5)


def test_a_model_that_is_divided_is_not_compiled():
    with pytest.raises(ConfigurationError, match="which strategy 'fsdp' cuts in pieces: use 'ddp'"):
        trained(compiles=True, strategy="fsdp")
