"""What joins any Lightning training to a federation: the model's arrays, and the local objective in its gradients."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from shoal import trees
from shoal.errors import ConfigurationError
from shoal.learners.torch_model import ObjectiveGradient, ResidentModel
from shoal.types import Array, Broadcast, ModelState


def around(module: LightningModule) -> ResidentModel:
    """Returns the names and roles of a module's own arrays, where they are; what is loaded goes into this module."""
    return ResidentModel(lambda: module, module.device, seed=0)


def changed(module: LightningModule, before: ModelState) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns what training changed in the parameters and in the buffers, in float64.

    Args:
        module: Trained; by now it may be on another device, with other tensors under the same names.
        before: The model that it started from.
    """
    arrays = dict(module.named_parameters()) | dict(module.named_buffers())
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
    every rank alike, and only to the parameters of the optimizer that is about to step.

    Args:
        broadcast: Has the terms, and the parameters w_global.

    Raises:
        ConfigurationError: An optimizer unscales fp16's gradients by itself, later than the terms can be added.
    """

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._gradients: dict[int, ObjectiveGradient] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings the terms to the device of the parameters."""
        resident = around(pl_module)
        for optimizer in trainer.optimizers:
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise ConfigurationError(
                    f"a fused {type(optimizer).__name__} unscales the gradients of fp16 inside its step, where a local "
                    "objective cannot be added: use fused=False, or precision='bf16-mixed'"
                )
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            stepped = {name: parameter for name, parameter in resident.params.items() if id(parameter) in own}
            self._gradients[id(optimizer)] = ObjectiveGradient(self._broadcast, resident, stepped)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds the gradient."""
        self._gradients[id(optimizer)].add()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the optimizers' parameters."""
        self._gradients.clear()
