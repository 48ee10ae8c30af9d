"""Operations on a block against what torch does for each client, and steps that are taken in the backward pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shoal
from shoal.learners.torch_block_functions import StackedCrossEntropy, StackedLinear
from shoal.learners.torch_memory import Pool
from shoal.learners.torch_stackable import find_stacking
from shoal.learners.torch_stacked_optimizer import plain_rates
from support import CLASSES, FEATURES, Mlp, assert_equal, learner, population, samples

POOL = Pool(torch.device("cpu"))


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_cross_entropy_is_each_clients_own(scale, ignored):
    torch.manual_seed(0)
    x = (scale * torch.randn(3, 7, 4, dtype=torch.float64)).requires_grad_()
    y = torch.randint(4, (3, 7))
    y[0, 0], y[1, 0] = -100 if ignored == -100 else 2, 1
    found = StackedCrossEntropy.apply(x, y, ignored)
    expected = torch.stack([F.cross_entropy(scores, t, ignore_index=ignored) for scores, t in zip(x, y, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    outer = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, outer)[0], torch.autograd.grad(expected, x, outer)[0], rtol=1e-10, atol=1e-12
    )


def test_cross_entropy_of_a_client_whose_samples_are_all_left_out_is_torchs():
    x, y = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [-100, -100, -100]])
    found = StackedCrossEntropy.apply(x, y, -100)
    assert torch.isfinite(found).tolist() == [True, False]
    assert F.cross_entropy(x[1], y[1]).isnan() == found[1].isnan()


@pytest.mark.parametrize("backwards", [1, 2])
def test_cross_entropy_can_be_differentiated_again_and_twice(backwards):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(4, (2, 3))
    assert torch.autograd.gradgradcheck(lambda scores: StackedCrossEntropy.apply(scores, y, -100), (x,))
    loss = StackedCrossEntropy.apply(x, y, -100).sum()
    for _ in range(backwards):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, backwards * torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("stepped", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_a_linear_layer_steps_the_parameters_that_have_a_rate_and_no_others(stepped):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    params = {"weight": torch.randn(3, 2, 4, dtype=torch.float64), "bias": torch.randn(3, 2, dtype=torch.float64)}
    params = {name: array.requires_grad_() for name, array in params.items()}
    before = {name: array.detach().clone() for name, array in params.items()}
    expected = torch.autograd.grad(
        (torch.einsum("cni,coi->cno", x, params["weight"]) + params["bias"][:, None]).square().sum(),
        (x, params["weight"], params["bias"]),
    )
    rates = {id(params[name]): 0.25 for name in stepped}
    StackedLinear.apply(x, params["weight"], params["bias"], POOL, rates).square().sum().backward()
    torch.testing.assert_close(x.grad, expected[0])
    for name, gradient in zip(("weight", "bias"), expected[1:], strict=True):
        if name in stepped:
            assert params[name].grad is None
            torch.testing.assert_close(params[name].detach(), before[name] - 0.25 * gradient)
        else:
            torch.testing.assert_close(params[name].grad, gradient)
            assert torch.equal(params[name].detach(), before[name])


class Twice(nn.Module):
    """A weight that is used twice: by a linear layer each time, or by another operation before or after it."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)
        self.inner = nn.Linear(FEATURES, FEATURES, bias=False)
        self.other = other

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scores."""
        start = self.first(inputs)
        hidden = (start @ self.inner.weight if self.other == "before" else self.inner(start)).tanh()
        return self.out(hidden @ self.inner.weight if self.other == "after" else self.inner(hidden))


@pytest.mark.parametrize(
    ("model", "at_once"),
    [
        (Mlp, True),
        (partial(Twice, "linear"), False),
        (partial(Twice, "before"), False),
        (partial(Twice, "after"), True),  # whose backward pass comes first
    ],
)
def test_a_weight_that_is_needed_after_its_step_is_not_stepped_at_once(model, at_once):
    ours = learner(model, epochs=2)
    assert find_stacking(ours, samples(60)).steps_at_once is at_once
    found, expected = (
        shoal.federate(ours, population(), rounds=2, engine=engine) for engine in ("vectorized", "sequential")
    )
    assert_equal(found.params, expected.params, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({}, True),
        ({"dampening": 0.5}, True),
        ({"momentum": 0.9}, False),
        ({"weight_decay": 0.1}, False),
        ({"maximize": True}, False),
        ({"lr": torch.tensor(0.1)}, False),
    ],
)
def test_only_a_plain_step_needs_the_gradient_alone(settings, plain):
    parameter = nn.Parameter(torch.zeros(2))
    rates = plain_rates(torch.optim.SGD([parameter], **{"lr": 0.1, **settings}))
    assert rates == ({id(parameter): 0.1} if plain else {})
    assert plain_rates(torch.optim.Adam([parameter])) == {}


@pytest.mark.parametrize("settings", [{"learner": {"clip_norm": 0.1}}, {"algorithm": shoal.FedProx(mu=0.5)}])
def test_steps_that_need_more_than_one_layers_gradient_wait_for_all(settings):
    ours = learner(epochs=2, **settings.pop("learner", {}))
    found, expected = (
        shoal.federate(ours, population(), rounds=2, engine=engine, **settings)
        for engine in ("vectorized", "sequential")
    )
    assert find_stacking(ours, samples(60)).steps_at_once
    assert_equal(found.params, expected.params, atol=1e-6)
