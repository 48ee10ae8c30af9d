"""Layers whose weights differ by client, in the form that a block of clients runs fastest in.

``torch.func.vmap`` runs a module for many clients at once, and is right for nearly every operation. For the few that
take most of the time it moves memory that need not move. Inside :class:`PerClient` those are replaced:

- a linear layer's weight gradient is made in the layout of the weight, or its step of plain SGD taken at once;
- convolutions and pools keep the clients beside the channels, in channels-last memory, so that nothing is copied
  between them; a convolution is a grouped one, or a matrix product over unfolded patches; group normalisation takes
  what they leave, which vmap's own rule refuses;
- cross entropy takes all clients' samples as one batch;
- recurrent layers, which vmap cannot run, are made of linear ones;
- attention takes all clients' heads as one batch;
- dropout draws each client's noise from that client's own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from shoal.learners.torch_block_functions import StackedCrossEntropy, StackedLinear
from shoal.learners.torch_memory import Pool
from shoal.learners.torch_recurrent import gru, lstm, rnn_relu, rnn_tanh
from shoal.learners.torch_vmap import on_block

Convolution = Literal["grouped", "matmul"]
"""How a convolution with a weight for each client runs."""

CONVOLUTIONS: tuple[Convolution, ...] = get_args(Convolution)


class PerClient(TorchFunctionMode):
    """Replaces operations inside ``vmap`` over clients.

    Args:
        convolution: How convolutions run.
        pool: Has memory for the weights' gradients.
        noise_format: In which order of memory dropout fills its noise. Alone, it is that of its input; which that is in
            a block is not known here, but found by trying (see ``torch_stackable``).
    """

    def __init__(
        self,
        convolution: Convolution,
        pool: Pool,
        noise_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.generators: Sequence[torch.Generator] = ()
        """The clients' generators, on the model's device, in the order of the clients. Dropout draws from them what it
        would draw for that client alone."""
        self.rates: Mapping[int, float] = {}
        """The learning rates of the stacked parameters that linear layers step in their backward pass, by their ids."""
        self._pool = pool
        self._noise_format = noise_format
        self._rules: dict[Any, Callable[..., Tensor]] = {
            F.linear: self._linear,
            F.conv2d: partial(_convolution, convolution),
            F.max_pool2d: _pooling(F.max_pool2d),
            F.avg_pool2d: _pooling(F.avg_pool2d),
            F.group_norm: _group_norm,
            F.cross_entropy: _cross_entropy,
            F.dropout: self._dropout,
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._inside(_multi_head_attention),
            **{getattr(torch, rule.__name__): self._inside(rule) for rule in (lstm, gru, rnn_tanh, rnn_relu)},
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls the rule for an operation, or the operation."""
        rule = self._rules.get(func)
        return func(*args, **(kwargs or {})) if rule is None else rule(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p in (0.0, 1.0):
            return F.dropout(input, p, training, inplace)

        def drop(inputs: Tensor) -> tuple[Tensor, int]:
            noise = torch.empty_like(inputs, memory_format=self._noise_format)
            for row, generator in zip(noise, self.generators, strict=True):
                row.bernoulli_(1 - p, generator=generator)
            return inputs * noise.div_(1 - p), 0

        return on_block(drop, lambda x: F.dropout(x, p), input)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rule = partial(_stacked_linear, self._pool, self.rates)
        return on_block(rule, F.linear, *_in_precision(input, weight, bias))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> Tensor:
        if dropout_p and not others and attn_mask is None and not is_causal:
            scores = (query @ key.mT) * query.shape[-1] ** -0.5
            return self._dropout(scores.softmax(-1), dropout_p) @ value

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **others)

        def folded(q: Tensor, k: Tensor, v: Tensor, shared: Sequence[bool]) -> tuple[Tensor, int]:
            if any(shared):
                k, v = (x.expand(len(q), *x.shape) if same else x for x, same in zip((k, v), shared, strict=True))
            return torch.unflatten(plain(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)), 0, q.shape[:2]), 0

        # With a mask of its own shape, or noise that is not the clients', vmap has the word.
        foldable = attn_mask is None and not dropout_p and query.ndim > 2
        return on_block(folded if foldable else None, plain, query, key, value)

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function so that the rules hold for what it calls."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run


def _transparent(function: Any) -> Callable[..., Any]:
    """Returns one of torch's Python functions without its own look for overrides, so that those inside are found."""
    seen = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(function.__code__, seen, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_multi_head_attention = _transparent(F.multi_head_attention_forward)


def _in_precision(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns the operands as autocast would, for which a rule's own matrix products come too late."""
    kind = next(operand.device.type for operand in operands if operand is not None)
    if not torch.is_autocast_enabled(kind):
        return operands
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x is not None and x.dtype == torch.float32 else x for x in operands)


def _stacked_linear(
    pool: Pool,
    rates: Mapping[int, float],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared: Sequence[bool],
) -> tuple[Tensor, int]:
    if shared[0]:
        result = F.linear(x, weight, bias if shared[1] else None)
        if bias is not None and not shared[1]:
            result = result + bias.reshape(len(bias), *[1] * (result.ndim - 2), -1)
        return result, 0
    clients, features = x.shape[0], x.shape[-1]
    offset = bias.expand(clients, -1) if bias is not None and shared[1] else bias
    rows = x if x.ndim == 3 else x.reshape(clients, -1, features)
    result = StackedLinear.apply(rows, weight, offset, pool, rates)  # type: ignore[no-untyped-call]
    return result if x.ndim == 3 else result.reshape(*x.shape[:-1], weight.shape[1]), 0


def _convolution(
    kind: Convolution,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    def plain(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(x, w, b, stride, padding, dilation, groups)

    def run(x: Tensor, w: Tensor, b: Tensor | None, shared: Sequence[bool]) -> tuple[Tensor, int]:
        clients = len(x)
        if shared[0] and shared[1]:
            return torch.unflatten(plain(x.flatten(0, 1), w, b), 0, (clients, -1)), 0
        w = w.expand(clients, *w.shape) if shared[0] else w
        b = b.expand(clients, -1) if b is not None and shared[1] else b
        return lowered(x, w, b)

    def grouped(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, int]:
        all_groups, offset = groups * len(x), None if b is None else b.reshape(-1)
        result = F.conv2d(_beside_channels(x), w.flatten(0, 1), offset, stride, padding, dilation, all_groups)
        return torch.unflatten(result, 1, (len(x), -1)), 1

    def product(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, int]:
        kernel = w.shape[-2:]
        patches = F.unfold(x.flatten(0, 1), tuple(kernel), dilation, padding, stride)
        result = w.flatten(2).unsqueeze(1) @ torch.unflatten(patches, 0, x.shape[:2])
        if b is not None:
            result = result + b[:, None, :, None]
        return torch.unflatten(result, -1, _spatial(x, kernel, stride, padding, dilation)), 0

    can_multiply = groups == 1 and not isinstance(padding, str)
    lowered = product if kind == "matmul" and can_multiply else grouped
    return on_block(run if input.ndim == 4 else None, plain, input, weight, bias)


def _spatial(x: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Returns the height and width that a convolution gives."""
    rules = [(value, value) if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)]
    steps, pads, gaps = rules
    return [
        (size + 2 * pads[axis] - gaps[axis] * (kernel[axis] - 1) - 1) // steps[axis] + 1
        for axis, size in enumerate(x.shape[-2:])
    ]


def _pooling(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def pooled(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def plain(x: Tensor) -> Tensor:
            return pool(x, *args, **kwargs)

        def beside(x: Tensor) -> tuple[Tensor, int]:
            return torch.unflatten(plain(_beside_channels(x)), 1, (len(x), -1)), 1

        return on_block(beside if input.ndim == 4 else None, plain, input)

    return pooled


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    def plain(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.group_norm(x, num_groups, w, b, eps)

    def normed(x: Tensor, w: Tensor | None, b: Tensor | None, shared: Sequence[bool]) -> tuple[Tensor, int]:
        result = F.group_norm(x.flatten(0, 1), num_groups, eps=eps).reshape(x.shape)
        over = [1] * (x.ndim - 3)  # the axes behind the channels
        if w is not None:
            result = result * (w.view(1, 1, -1, *over) if shared[0] else w.view(len(x), 1, -1, *over))
        if b is not None:
            result = result + (b.view(1, 1, -1, *over) if shared[1] else b.view(len(x), 1, -1, *over))
        return result, 0

    return on_block(normed, plain, input, weight, bias)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    def plain(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y, weight, size_average, ignore_index, reduce, reduction, label_smoothing)

    def folded(x: Tensor, y: Tensor, shared: Sequence[bool]) -> tuple[Tensor, int]:
        y = y.expand(len(x), *y.shape) if shared[0] else y
        x = x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64 else x
        return StackedCrossEntropy.apply(x, y, ignore_index), 0  # type: ignore[no-untyped-call]

    usual = (weight, size_average, reduce, reduction, label_smoothing) == (None, None, None, "mean", 0.0)
    classes = input.ndim == 2 and not target.is_floating_point()
    return on_block(folded if usual and classes else None, plain, input, target)


def _beside_channels(x: Tensor) -> Tensor:
    """Returns [clients, n, channels, h, w] as [n, clients · channels, h, w] in channels-last memory."""
    return x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
