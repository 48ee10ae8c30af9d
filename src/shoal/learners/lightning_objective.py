"""What joins any Lightning training to a federation: the model's arrays, and the local objective in its gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal import trees
from shoal.errors import ConfigurationError
from shoal.learners.lightning_sharded import divides, own_name, parts_of
from shoal.learners.torch_model import ObjectiveGradient, ResidentModel
from shoal.types import Array, Broadcast, ModelState


def arrays_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's arrays by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def changed(arrays: Mapping[str, Tensor], before: ModelState) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns what training changed in the parameters and in the buffers, in float64.

    Args:
        arrays: After training, whole, by the names that they had before; on any device.
        before: The model that it started from.
    """
    trees_before = (
        {name: torch.as_tensor(array) for name, array in tree.items()} for tree in (before.params, before.buffers)
    )
    with torch.no_grad():
        delta, buffers = (
            trees.difference({name: arrays[name].to(tree[name].device) for name in tree}, tree) for tree in trees_before
        )
    return delta, buffers


class LocalObjectiveCallback(Callback):
    """Adds the gradient of the local objective's proximal and correction terms, once for each step of an optimizer.

    It does so after gradients were accumulated, averaged over the ranks and unscaled, and before they are clipped; on
    every rank alike, and only to the parameters of the optimizer that is about to step. Where the parameters are
    divided among the ranks, so are the terms.

    Args:
        broadcast: Has the terms, and the parameters w_global.

    Raises:
        ConfigurationError: An optimizer unscales fp16's gradients by itself, later than the terms can be added.
    """

    _resident: ResidentModel
    """The module's own names, as they were before a strategy wrapped its parts."""

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._gradients: dict[int, ObjectiveGradient] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the parameters' names, which a strategy will change."""
        self._resident = ResidentModel(lambda: pl_module, pl_module.device, seed=0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings the terms to where the parameters are."""
        resident = self._resident
        current = {own_name(name): parameter for name, parameter in pl_module.named_parameters()}
        params = {name: current[name] for name in resident.params}
        resident.device = next(iter(params.values())).device
        broadcast = _divided(self._broadcast, trainer, params) if divides(trainer) else self._broadcast
        for optimizer in trainer.optimizers:
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise ConfigurationError(
                    f"a fused {type(optimizer).__name__} unscales the gradients of fp16 inside its step, where a local "
                    "objective cannot be added: use fused=False, or precision='bf16-mixed'"
                )
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            # Of some parameters a rank may have no part.
            stepped = {name: p for name, p in params.items() if id(p) in own and p.numel()}
            self._gradients[id(optimizer)] = ObjectiveGradient(broadcast, resident, stepped)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds the gradient."""
        self._gradients[id(optimizer)].add()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the optimizers' parameters."""
        self._gradients.clear()
        del self._resident


def _divided(broadcast: Broadcast, trainer: Trainer, params: Mapping[str, Tensor]) -> Broadcast:
    """Returns this rank's part of a broadcast, whose parameters are those that the module has now."""
    objective, model = broadcast.objective, trainer.strategy.model
    if objective.correction and model is not None:
        correction = parts_of(objective.correction, model, params)
        objective = dataclasses.replace(objective, correction=correction)
    anchor = trees.copy(params) if objective.proximal else {}
    return dataclasses.replace(broadcast, model=ModelState(params=anchor), objective=objective)
