"""Operations on a whole block of clients that have a backward pass of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.learners.torch_memory import Pool


class StackedLinear(torch.autograd.Function):
    """``x @ weightᵀ + bias`` for each client: x [clients, n, in], weight [clients, out, in], bias [clients, out].

    The backward pass makes the weight's gradient in the weight's layout, where autograd's own would be transposed and
    copied. For parameters with a rate it makes none, and takes the step of plain SGD itself: a gradient as large as the
    parameters is neither written nor read.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - torch takes no arguments by name
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool, rates: Mapping[int, float]
    ) -> Tensor:
        """Computes it.

        Args:
            ctx: Keeps what the backward pass needs.
            x: Inputs.
            weight: Weights.
            bias: Offsets, or None.
            pool: Has memory for the weight's gradient.
            rates: The learning rate of each parameter that is stepped at once, by its id.
        """
        ctx.save_for_backward(x, weight)
        ctx.pool = pool
        ctx.weight_rate, ctx.bias_rate = rates.get(id(weight)), rates.get(id(bias))
        ctx.bias = None if bias is None or ctx.bias_rate is None else bias.detach()
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, the weight and the bias; none of those that it steps."""
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            torch.bmm(gradient, weight) if of_x else None,  # before the weight changes
            _weight_step(gradient, x, weight, ctx) if of_weight else None,
            _bias_step(gradient, ctx) if of_bias else None,
            None,
            None,
        )


def _weight_step(gradient: Tensor, x: Tensor, weight: Tensor, ctx: Any) -> Tensor | None:
    if ctx.weight_rate is not None:
        weight.detach().baddbmm_(gradient.mT, x, alpha=-ctx.weight_rate)
        return None
    if torch.is_grad_enabled():  # a gradient of this gradient is wanted
        return torch.bmm(gradient.mT, x)
    shape = (len(x), gradient.shape[-1], x.shape[-1])
    return torch.bmm(gradient.mT, x, out=ctx.pool.take(shape, torch.result_type(gradient, x)))


def _bias_step(gradient: Tensor, ctx: Any) -> Tensor | None:
    if ctx.bias is None:
        return gradient.sum(1)
    ctx.bias.add_(gradient.sum(1), alpha=-ctx.bias_rate)
    return None


class StackedCrossEntropy(torch.autograd.Function):
    """The mean cross entropy of each client, [clients]: of x [clients, n, classes] and classes y [clients, n].

    In few operations, because for few classes each takes longer to call than to compute.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, ignored: int) -> Tensor:
        """Computes it.

        Args:
            ctx: Keeps what the backward pass needs.
            x: Scores.
            y: Classes.
            ignored: The class whose samples are left out.
        """
        counts = y != ignored
        picked = torch.where(counts, y, 0).long().unsqueeze(-1)
        top = x.amax(-1, keepdim=True)
        shares = (x - top).exp_()
        total = shares.sum(-1, keepdim=True)
        losses = total.log().add_(top).sub_(x.gather(-1, picked)).squeeze(-1)
        number = counts.sum(1)
        ctx.save_for_backward(x, shares.div_(total), picked, counts, number)
        return losses.mul_(counts).sum(1) / number

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient of x."""
        (gradient,) = gradients
        x, shares, picked, counts, number = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            shares = x.softmax(-1)
        scale = counts * (gradient / number).unsqueeze(-1)
        missing = shares.scatter_add(-1, picked, torch.full_like(picked, -1, dtype=x.dtype))
        return missing * scale.unsqueeze(-1), None, None
