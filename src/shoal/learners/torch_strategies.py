"""A module spread over devices: one copy, copies, or parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from shoal import trees
from shoal.devices import Devices
from shoal.errors import ConfigurationError
from shoal.learners.torch_devices import cuda_ids
from shoal.learners.torch_model import ResidentModel
from shoal.learners.torch_ranks import Ranks
from shoal.learners.torch_step import needs_closure
from shoal.types import Array, ModelState, Params

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner

UNIT = 0.25
"""A part of a model with more than this share of its parameters is divided further before FSDP gathers it whole."""


class SpreadModel:
    """A module as the step of one rank sees it.

    Args:
        resident: The module on this rank's device; the strategy may change it for good.
        devices: Names the strategy.
        ranks: Those that train together.

    Raises:
        ConfigurationError: The strategy cannot have the module.
    """

    def __init__(self, resident: ResidentModel, devices: Devices, ranks: Ranks) -> None:
        self._resident = resident
        self._ranks = ranks
        self.module = resident.module
        self.call: Callable[[Any], Any] = resident.call
        """Runs the module on a batch, for training."""
        self._evaluating: Callable[[Any], Any] = resident.call
        self.close: Callable[[], None] = lambda: None
        """Lets go of the ranks' group, as must be done before that ends; there are no more steps then."""
        self.drop_gathered: Callable[[], None] = lambda: None
        """Has each part of the module gathered anew when it is called next: its parameters were written to."""
        self._sync: Callable[[bool], contextlib.AbstractContextManager[object]] = lambda _: contextlib.nullcontext()
        if devices.strategy == "dp":
            ids = list(cuda_ids(devices, torch.cuda.device_count()))
            self.call = self._evaluating = nn.DataParallel(self.module, device_ids=ids)
        elif devices.strategy == "ddp":
            self._copy(_Calling(resident) if resident.call is not resident.module else resident.module, ranks)
        elif devices.strategy == "fsdp":
            self._divide(resident, ranks)
        self.params = resident.params
        """The parameters to train; with ``fsdp``, this rank's parts of them."""

    def evaluate(self, inputs: Any) -> Any:
        """Runs the module on a batch that the other ranks need not have; with ``fsdp`` they must have one too."""
        return self._evaluating(inputs)

    def syncing(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """Returns the context of one of a step's backward passes; the ranks' gradients meet in the last."""
        return self._sync(last)

    def drop_gradients(self) -> None:
        """Forgets the gradients."""
        for tensor in self.params.values():
            tensor.grad = None

    def on_device(self, tree: Params) -> dict[str, Tensor]:
        """Returns whole arrays of the parameters' names as the parameters are: on the device; with ``fsdp``, parts."""
        own = self.params
        return {
            name: part_of(torch.as_tensor(array, device=own[name].device), own[name]) for name, array in tree.items()
        }

    def load(self, model: ModelState) -> None:
        """Copies a model's whole arrays, which every rank has, into the module."""
        self.drop_gathered()
        self._resident.load(model)

    def align_buffers(self) -> None:
        """Gives every rank the buffers of rank 0; running statistics are those of a rank's own part of each batch.

        Raises:
            WorkerError: A rank is gone.
        """
        if self._ranks.count > 1:
            for buffer in self.module.buffers():
                self._ranks.align(buffer)

    def state(self, *, keep: bool = True) -> ModelState:
        """Returns copies of the whole module's arrays, on the CPU; every rank must ask.

        Args:
            keep: Whether they are wanted here, and not only on another rank; else there are none.

        Raises:
            WorkerError: A rank is gone.
        """
        self.align_buffers()

        def gathered(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = ((name, whole(array.detach())) for name, array in arrays.items())
            return {name: array.cpu().clone() for name, array in found if keep}

        own = self._resident
        return ModelState(params=gathered(own.params), buffers=gathered(own.buffers), constants=gathered(own.constants))

    def delta(self, before: ModelState) -> tuple[dict[str, Array], dict[str, Array]]:
        """Returns what training changed in the parameters and the buffers, whole, in float64, on the CPU.

        Every rank must ask, and all get the same.

        Raises:
            WorkerError: A rank is gone.
        """
        self.align_buffers()

        def changed(own: Mapping[str, Tensor], tree: Params) -> dict[str, Array]:
            after = {name: whole(array.detach()).cpu() for name, array in own.items()}
            return trees.difference(after, {name: torch.as_tensor(tree[name], device="cpu") for name in own})

        own = self._resident
        return changed(own.params, before.params), changed(own.buffers, before.buffers)

    def _copy(self, module: nn.Module, ranks: Ranks) -> None:
        on = [ranks.device.index] if ranks.device.type == "cuda" else None
        # The gradients lie where they are sent from: no copy of them is kept.
        copied = nn.parallel.DistributedDataParallel(module, device_ids=on, gradient_as_bucket_view=True)
        self.call = copied

        def sync(last: bool) -> contextlib.AbstractContextManager[object]:
            return contextlib.nullcontext() if last else copied.no_sync()

        def close() -> None:
            # Were they the last to hold the group, torch would wait for its threads with Python's lock held, and those
            # may wait for the lock.
            del copied.reducer, copied.logger

        self._sync, self.close = sync, close

    def _divide(self, resident: ResidentModel, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.count,))
        if not isinstance(self.module, FSDPModule):  # the user may have divided it already
            # A tied parameter must not be in two units.
            for unit in [] if resident.tied else _units(self.module):
                fully_shard(unit, mesh=mesh)
            fully_shard(self.module, mesh=mesh)
        resident.rebind(fill)
        divided = cast("FSDPModule", self.module)
        self.call = self._evaluating = self.module

        @contextlib.contextmanager
        def sync(last: bool) -> Iterator[None]:
            divided.set_requires_gradient_sync(last)
            yield

        def drop_gathered() -> None:
            for part in self.module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

        self._sync, self.drop_gathered = sync, drop_gathered


class _Calling(nn.Module):
    """A module whose forward pass is compiled, as a module.

    Args:
        resident: Has both.
    """

    def __init__(self, resident: ResidentModel) -> None:
        super().__init__()
        self.module = resident.module
        self._call = resident.call

    def forward(self, inputs: Any) -> Any:
        """Returns what the module gives."""
        return self._call(inputs)


def spread(learner: TorchLearner, ranks: Ranks) -> SpreadModel:
    """Returns a learner's module, spread over its devices; it changes the learner's own for good.

    Raises:
        ConfigurationError: The strategy cannot have the module, or its ranks not the optimizer.
    """
    resident, devices = learner.resident, learner.devices
    check_strategy(devices, learner.device, resident.module, resident.params, compiles=learner.compile)
    if ranks.count > 1:
        optimizer = learner.optimizer(list(resident.params.values()))
        if needs_closure(optimizer):
            raise ConfigurationError(
                f"{type(optimizer).__name__} searches along a line by itself, which several ranks would do "
                "each in its own way: use one device, or another optimizer"
            )
    return SpreadModel(resident, devices, ranks)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor as it is on one device: of a part, all parts together; every rank must ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(value: Tensor, parameter: Tensor) -> Tensor:
    """Returns what a rank keeps of a whole tensor: of one shaped as a parameter, the part that it has of that."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    on = value.to(parameter.device)
    return distribute_tensor(on, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may hold this rank's part of it; every rank has the whole."""
    tensor.copy_(part_of(value, tensor))


def _units(module: nn.Module) -> list[nn.Module]:
    """Returns the parts of a module that are gathered and let go of one after the other.

    They are members of lists and sequences, because these are sure to be called; other parts may only lend their
    parameters, as the projection of ``nn.MultiheadAttention`` does.
    """
    most = UNIT * sum(parameter.numel() for parameter in module.parameters())

    def parts(inside: nn.Module) -> Iterator[nn.Module]:
        listed = isinstance(inside, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        for child in inside.children():
            size = sum(parameter.numel() for parameter in child.parameters())
            called = listed and not isinstance(child, nn.ModuleList | nn.ModuleDict)
            if called and 0 < size <= most:
                yield child
            else:
                yield from parts(child)

    return list(parts(module))


def check_strategy(
    devices: Devices, device: torch.device, module: nn.Module, params: Mapping[str, Tensor], *, compiles: bool = False
) -> None:
    """Refuses what a strategy cannot do.

    Raises:
        ConfigurationError: It is that.
    """
    if devices.precision == "fp16" and device.type == "cpu":
        raise ConfigurationError("fp16 is for CUDA devices: on a CPU use precision='bf16' or 'fp32'")
    if devices.strategy == "dp" and device.type != "cuda":
        raise ConfigurationError("strategy 'dp' copies a model among CUDA devices, and there is none: use 'ddp'")
    if compiles and devices.strategy in {"dp", "fsdp"}:
        raise ConfigurationError(
            f"compile=True makes one graph of the model, which strategy {devices.strategy!r} cuts in pieces: use 'ddp'"
        )
    kinds = {parameter.dtype for parameter in params.values()}
    if devices.strategy == "fsdp" and len(kinds) > 1:
        raise ConfigurationError(
            f"strategy 'fsdp' divides parameters of one dtype, and {type(module).__name__} trains "
            f"{', '.join(sorted(str(kind) for kind in kinds))}: use 'ddp'"
        )
