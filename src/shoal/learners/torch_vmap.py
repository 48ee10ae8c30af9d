"""``torch.vmap`` over clients, without the time that it takes to look through its arguments.

The names are torch's own for what ``vmap`` wraps. Its public ways are dear beside the layers of a small model: a call
of ``torch.vmap`` takes 0.1 ms, one of an ``autograd.Function`` with a rule for it 0.2 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.predispatch import lazy_load_decompositions
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

Rule = Callable[..., tuple[Tensor, int]]
"""Takes the operands with the clients on the first axis, and ``shared`` if there are several: which of those after the
first are the same for all clients, and so have no such axis. Returns the result and its axis of clients."""


def for_each_client(
    function: Callable[..., Mapping[str, Tensor]], operands: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Does what ``torch.vmap(function, randomness="error")(*operands)`` does.

    Args:
        function: Takes one client's operands.
        operands: [clients, …] each; None is None for every client.

    Returns:
        What the function returns, [clients, …] each.
    """
    clients = next(len(operand) for operand in operands if operand is not None)
    lazy_load_decompositions()
    level = functorch._vmap_increment_nesting(clients, "error")  # noqa: SLF001
    try:
        batched = [None if x is None else functorch._add_batch_dim(x, 0, level) for x in operands]  # noqa: SLF001
        results = function(*batched)
        return {
            name: functorch._remove_batch_dim(result, level, clients, 0)  # noqa: SLF001
            for name, result in results.items()
        }
    finally:
        functorch._vmap_decrement_nesting()  # noqa: SLF001


def on_block(rule: Rule | None, plain: Callable[..., Tensor], *operands: Any) -> Tensor:
    """Runs a rule on the clients' arrays as they lie in memory.

    Args:
        rule: What to do with all clients' arrays; None if vmap has the word.
        plain: The operation for one client, which vmap runs where the rule does not apply.
        operands: Tensors, or None for a missing one.
    """
    levels = [functorch.maybe_get_level(x) if isinstance(x, Tensor) else -1 for x in operands]
    level = levels[0]
    if rule is None or not functorch.is_batchedtensor(operands[0]) or any(own not in (level, -1) for own in levels):
        return plain(*operands)
    arrays = [_clients_first(x) if own == level else x for x, own in zip(operands, levels, strict=True)]
    if level > 1 and any(functorch.maybe_get_level(x) > 0 for x in arrays if isinstance(x, Tensor)):
        return plain(*operands)
    shared = {"shared": [own != level for own in levels[1:]]} if len(levels) > 1 else {}
    with temporarily_pop_interpreter_stack():  # outside of this vmap
        result, dim = rule(*arrays, **shared)
    wrapped: Tensor = functorch._add_batch_dim(result, dim, level)  # noqa: SLF001
    return wrapped


def _clients_first(batched: Tensor) -> Tensor:
    inner: Tensor = functorch.get_unwrapped(batched)
    dim = functorch.maybe_get_bdim(batched)
    return inner.movedim(dim, 0) if dim else inner
