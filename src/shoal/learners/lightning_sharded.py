"""A module that Lightning's FSDP has divided among the ranks: its arrays and its optimizers' states, whole and back."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.errors import ConfigurationError
from shoal.types import Params

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch puts into the names of arrays in modules that it has wrapped."""

COMPILED = "_orig_mod."
"""What a compiled part has in the names of its arrays, and not in those of an optimizer's state."""


def divides(trainer: Trainer) -> bool:
    """Tells whether the trainer's strategy divides the parameters among the ranks."""
    return isinstance(trainer.strategy, FSDPStrategy)


def check_divisible(trainer: Trainer, module: LightningModule) -> None:
    """Refuses what Lightning's FSDP would refuse in the midst of training.

    Raises:
        ConfigurationError: The module steps its optimizers itself, or gradients are to be clipped by their norm.
    """
    if not divides(trainer):
        return
    if not module.automatic_optimization:
        raise ConfigurationError(
            f"{type(module).__name__} optimizes by hand, and so goes backward inside of the forward pass for which "
            "Lightning's FSDP gathers the parameters: use strategy='ddp', or automatic optimization"
        )
    by_norm = trainer.gradient_clip_algorithm in {None, GradClipAlgorithmType.NORM}
    if trainer.gradient_clip_val and by_norm and not is_overridden("configure_gradient_clipping", module):
        raise ConfigurationError(
            f"gradient_clip_val={trainer.gradient_clip_val} clips by the norm, which Lightning's FSDP does not: say "
            "gradient_clip_algorithm='value', or give the module a configure_gradient_clipping that calls "
            "self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)"
        )


def own_name(name: str) -> str:
    """Returns the name that an array of a wrapped module had before."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def gathered(model: nn.Module, *, write: bool = False) -> Iterator[dict[str, nn.Parameter]]:
    """Yields a divided module's parameters whole, by their own names, unit by unit; every rank must ask.

    They are whole until the next unit is asked for, so that a device holds one unit at a time.

    Args:
        model: As the strategy has wrapped it.
        write: Whether what is written to them is kept.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    # A parent comes before its units: torch makes the first that it is asked for the root of all.
    units = [(name, unit) for name, unit in model.named_modules() if isinstance(unit, FullyShardedDataParallel)]
    for name, unit in units:
        within = tuple(f"{own_name(other)}." for other, _ in units if other != name and other.startswith(name))
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=write):
            whole = {own_name(own): parameter for own, parameter in unit.named_parameters(prefix=name)}
            yield {own: parameter for own, parameter in whole.items() if not own.startswith(within)}


@torch.no_grad()
def whole_arrays(model: nn.Module) -> dict[str, Tensor]:
    """Returns a divided module's trained parameters as copies on the CPU, and its buffers; every rank must ask."""
    arrays = {own_name(name): array for name, array in chain(model.named_parameters(), model.named_buffers())}
    for unit in gathered(model):
        arrays |= {name: array.to("cpu", copy=True) for name, array in unit.items() if array.requires_grad}
    return arrays


@contextmanager
def undivided_after(trainer: Trainer, module: nn.Module | None, *, changes: bool) -> Iterator[None]:
    """Makes a module what it was before the trainer's strategy divided it in the block: whole, on the CPU, unwrapped.

    Lightning leaves it divided, and cannot divide it once more in the next call. Where the strategy does not divide,
    nothing is done. Every rank must come to the end.

    Args:
        trainer: Called in the block with the module.
        module: The user's own, whose arrays are whole; None if there is none.
        changes: Whether the block gives the arrays other values; then they are gathered.
    """
    if module is None or not divides(trainer):
        yield
        return
    # As the parts themselves have them: torch's iterators leave out what is there under a second name.
    parts = [(part, dict(part._modules), dict(part._parameters)) for part in module.modules()]  # noqa: SLF001
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    before = {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}
    dtypes = {name: buffer.dtype for name, buffer in module.named_buffers()}
    yield
    wrapped = trainer.strategy.model
    after = whole_arrays(wrapped) if changes and wrapped is not None else {}
    whole: dict[str, nn.Parameter] = {}
    for part, children, parameters in parts:
        for key, child in children.items():
            setattr(part, key, child)
        for key, parameter in parameters.items():
            if parameter is None:
                continue
            name = names[id(parameter)]
            array = after[name] if name in after and parameter.requires_grad else before[name]
            setattr(part, key, whole.setdefault(name, nn.Parameter(array, requires_grad=parameter.requires_grad)))
    for name, buffer in module.named_buffers():
        buffer.data = buffer.data.to("cpu", dtypes.get(name, buffer.dtype))
    trainer.strategy.model = module
    trainer.strategy.optimizers = []
    gc.collect()  # the wrapped module refers to itself, and still has its part of the device


@torch.no_grad()
def parts_of(tree: Params, model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a rank has of whole arrays that are divided as a module's parameters are; every rank must ask.

    Args:
        tree: The arrays, by the names of parameters.
        model: As the strategy has wrapped it; left as it is.
        params: The parameters as this rank has them.
    """
    before = {name: params[name].clone() for name in tree}
    for unit in gathered(model, write=True):
        for name in unit.keys() & tree.keys():
            unit[name].copy_(torch.as_tensor(tree[name]))
    parts = {name: params[name].clone() for name in tree}
    for name, own in before.items():
        params[name].copy_(own)
    return parts


def whole_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Returns an optimizer's state as its own ``state_dict`` would be on one device; every rank must ask."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    found: Any = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    names = chain.from_iterable(group["params"] for group in found["param_groups"])
    return _renamed(found, {name: number for number, name in enumerate(names)})


def put_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Undoes :func:`whole_state`, perhaps on other ranks or of one device; every rank must ask."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    names = {id(own): own_name(name).replace(COMPILED, "") for name, own in model.named_parameters()}
    order = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    named = _renamed(state, {number: names[id(own)] for number, own in enumerate(order)})
    set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns an optimizer's state with other names for the parameters."""
    groups = [{**group, "params": [names[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[name]: kept for name, kept in state["state"].items()}, "param_groups": groups}
