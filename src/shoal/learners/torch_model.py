"""One torch module that stays on its device while the states of many clients pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shoal import trees
from shoal.errors import ConfigurationError
from shoal.learners.torch_compiled import compiled
from shoal.types import Array, Broadcast, ModelState, Params

ModuleSource = nn.Module | Callable[[], nn.Module]
"""A module to copy, or a function (or class) that makes one."""

_NOTHING = nullcontext()


class ResidentModel:
    """A module on a device, and the names by which its arrays travel.

    Args:
        source: The user's module, copied and left as it is, or the function that makes it.
        device: Where it lives.
        seed: Seeds torch while the function makes the module, on the CPU whatever the device, so that the first
            parameters are the same everywhere.
        compiles: Whether :attr:`call` is compiled.
        channels_last: Whether the weights of 2-D convolutions lie in memory with the channels last.

    Raises:
        ConfigurationError: The module has nothing to train, or parameters that cannot be averaged.
    """

    def __init__(
        self,
        source: ModuleSource,
        device: torch.device,
        seed: int,
        *,
        compiles: bool = False,
        channels_last: bool = False,
    ) -> None:
        with seeded(torch.device("cpu"), seed):
            module = deepcopy(source) if isinstance(source, nn.Module) else source()
        if not isinstance(module, nn.Module):
            raise ConfigurationError(f"the model must be a torch.nn.Module or make one, not {type(module).__name__}")
        _check_parameters(module)
        self.module = module.to(device)
        if channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.call: Callable[[Any], Any] = compiled(self.module) if compiles else self.module
        """Runs the module on a batch."""
        self.device = device
        persistent = self.module.state_dict(keep_vars=True)
        parameters = dict(self.module.named_parameters())
        buffers = dict(self.module.named_buffers())
        self.params = {name: p for name, p in parameters.items() if p.requires_grad}
        self.buffers = {name: b for name, b in buffers.items() if b.is_floating_point() and name in persistent}
        kept = {**parameters, **{name: b for name, b in buffers.items() if name in persistent}}
        self.constants = {name: t for name, t in kept.items() if name not in self.params and name not in self.buffers}
        # Buffers outside the state dict still may change in training; no client may find another's.
        self._transient = [(b, b.clone()) for name, b in buffers.items() if name not in persistent]
        self._loaded: tuple[Params, list[int]] | None = None
        self._write: Callable[[Tensor, Tensor], object] = Tensor.copy_
        by_identity = {id(tensor): name for name, tensor in kept.items()}
        self._canonical = {name: by_identity[id(t)] for name, t in persistent.items() if id(t) in by_identity}

    def rebind(self, write: Callable[[Tensor, Tensor], object]) -> None:
        """Takes up what a strategy has put in the place of the module's arrays, under the same names.

        Args:
            write: Copies a whole array into what is there of it.
        """
        current = dict(self.module.named_parameters())
        self.params = {name: current[name] for name in self.params}
        self.constants = {name: current.get(name, array) for name, array in self.constants.items()}
        self._write = write

    @property
    def tied(self) -> bool:
        """Whether an array has several names."""
        return any(name != canonical for name, canonical in self._canonical.items())

    def state(self) -> ModelState:
        """Returns copies of the module's arrays."""
        return ModelState(
            params=trees.copy(self.params), buffers=trees.copy(self.buffers), constants=trees.copy(self.constants)
        )

    @torch.no_grad()
    def load(self, model: ModelState) -> None:
        """Copies a model's arrays into the module."""
        for own, given in ((self.params, model.params), (self.buffers, model.buffers)):
            for name, tensor in own.items():
                self._write(tensor, torch.as_tensor(given[name]))
        self._load_constants(model.constants)
        for tensor, first in self._transient:
            tensor.copy_(first)

    def _load_constants(self, constants: Params) -> None:
        """Copies what seldom changes, such as a frozen base, only where it is not there already."""
        same = self._loaded is not None and self._loaded[0] is constants
        versions = self._loaded[1] if self._loaded is not None else []
        for index, (name, tensor) in enumerate(self.constants.items()):
            if not same or _writes(tensor) != versions[index]:
                self._write(tensor, torch.as_tensor(constants[name]))
        self._loaded = constants, [_writes(tensor) for tensor in self.constants.values()]

    def drop_gradients(self) -> None:
        """Forgets the gradients, as an optimizer's ``zero_grad`` does in ten times the time."""
        for tensor in self.params.values():
            tensor.grad = None

    def syncing(self, *, last: bool) -> AbstractContextManager[object]:  # noqa: ARG002 - there is no one else
        """Returns the context of a backward pass: that of any other code."""
        return _NOTHING

    def delta(self, before: ModelState) -> tuple[dict[str, Array], dict[str, Array]]:
        """Returns what training changed in the parameters and in the buffers, in float64."""
        return self._difference(self.params, before.params), self._difference(self.buffers, before.buffers)

    def state_dict(self, model: ModelState) -> dict[str, Array]:
        """Returns ``model`` by the names of the module's state dict, tied weights under each of theirs."""
        arrays = model.merged()
        return {name: arrays[canonical] for name, canonical in self._canonical.items()}

    def on_device(self, tree: Params) -> dict[str, Tensor]:
        """Returns the tree as tensors on the module's device, copied only where it is elsewhere."""
        return {name: torch.as_tensor(array, device=self.device) for name, array in tree.items()}

    @torch.no_grad()
    def _difference(self, own: Mapping[str, Tensor], before: Params) -> dict[str, Array]:
        return trees.difference(own, self.on_device({name: before[name] for name in own}))


class Placing(Protocol):
    """A model as the local objective needs it."""

    def on_device(self, tree: Params) -> dict[str, Tensor]:
        """Returns arrays of the parameters' names where the parameters are."""
        ...  # pragma: no cover


class ObjectiveGradient:
    """The gradient of the local objective's terms beside the task loss: ``correction + proximal · (w − w_global)``.

    Args:
        broadcast: Has the terms and the parameters w_global.
        model: Brings them to where they are to be.
        params: The parameters w of one client; or of several, stacked on a first axis.
    """

    def __init__(self, broadcast: Broadcast, model: Placing, params: Mapping[str, Tensor]) -> None:
        objective = broadcast.objective
        self._params = params
        self._proximal = objective.proximal
        self._anchor = model.on_device(broadcast.model.params) if objective.proximal else {}
        self._correction = model.on_device(objective.correction or {})

    @property
    def active(self) -> bool:
        """Whether there are such terms."""
        return bool(self._anchor or self._correction)

    def add(self) -> None:
        """Adds the gradient to what ``backward`` left in the parameters' ``grad``."""
        if self.active:
            self._add()

    @torch.no_grad()
    def _add(self) -> None:
        for name, parameter in self._params.items():
            if parameter.grad is None:  # not reached by the task loss, yet part of the objective
                parameter.grad = torch.zeros_like(parameter)
            if name in self._correction:
                parameter.grad.add_(self._correction[name])
            if name in self._anchor:
                parameter.grad.add_(parameter - self._anchor[name], alpha=self._proximal)


class BorrowedModule:
    """A module to be called with arrays of the caller's in place of its own.

    It does what ``torch.func.functional_call`` does in a tenth of the time, which small models feel.

    Args:
        module: Stays as it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Recurrent modules keep a second list of their weights, which functional_call knows of.
        self._plain = not any(isinstance(part, nn.RNNBase) for part in module.modules())
        self._places: dict[str, list[tuple[dict[str, Tensor | None], str]]] = {}
        own: dict[int, str] = {}
        for prefix, part in module.named_modules(remove_duplicate=True):
            for arrays in (part._parameters, part._buffers):  # noqa: SLF001 - where a module looks its arrays up
                for name, array in arrays.items():
                    if array is not None:
                        # A tied array has several places under the name of the first.
                        known = own.setdefault(id(array), f"{prefix}.{name}" if prefix else name)
                        self._places.setdefault(known, []).append((cast("dict[str, Tensor | None]", arrays), name))

    def call(self, arrays: Mapping[str, Tensor], inputs: Any) -> Any:
        """Returns what the module gives for ``inputs`` with these arrays; the others are its own."""
        if not self._plain:
            return functional_call(self._module, dict(arrays), (inputs,))
        kept = [(place, key, place[key]) for name in arrays for place, key in self._places[name]]
        try:
            for name, array in arrays.items():
                for place, key in self._places[name]:
                    place[key] = array
            return self._module(inputs)
        finally:
            for place, key, before in kept:
                place[key] = before


@contextmanager
def seeded(device: torch.device, seed: int, *others: torch.device) -> Iterator[None]:
    """Seeds torch's generators on the CPU and on ``device``, and restores their states, and others', at the end."""
    # Not torch.random.fork_rng, which takes longer than a step of a small model.
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    if device.type != "cuda":
        try:
            yield
        finally:
            torch.set_rng_state(before)
        return
    with torch.random.fork_rng(devices=[device, *others]), torch.cuda.device(device):
        torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before)


def reseed(devices: Sequence[torch.device], seed: int) -> None:
    """Seeds torch's generators on the CPU and on each of the devices; inside of :func:`seeded`, which undoes it."""
    torch.default_generator.manual_seed(seed)
    for number, device in enumerate(devices):
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed + number)  # copies of a model draw noise of their own


def _writes(tensor: Tensor) -> int:
    """Returns how often the tensor was written in place, as autograd counts it."""
    return tensor._version  # noqa: SLF001 - torch has no public name for it


def _check_parameters(module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if nn.parameter.is_lazy(parameter):
            raise ConfigurationError(
                f"parameter {name} of {type(module).__name__} has no shape yet; run the module once where you make it"
            )
        if parameter.is_complex():
            raise ConfigurationError(f"parameter {name} of {type(module).__name__} is complex; use two real ones")
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigurationError(f"{type(module).__name__} has no parameter with requires_grad=True: nothing to train")
