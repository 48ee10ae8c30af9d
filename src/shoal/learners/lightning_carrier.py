"""What comes in and out of a training that may run in other processes: seeds, metrics, the optimizers' state."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from shoal.errors import ConfigurationError
from shoal.learners.lightning_metrics import LoggedMeans, gather_json
from shoal.learners.lightning_sharded import divides, own_name, put_state, whole_arrays, whole_state
from shoal.learners.lightning_state import pack, unpack
from shoal.learners.lightning_trainer import Hush, end_with_caller, forks
from shoal.learners.lightning_watch import tell_started
from shoal.processes.rest import rest_at_exit

Carried = tuple[dict[str, Tensor], dict[str, Any]]
"""The state of optimizers, schedulers and counters: tensors by name, and JSON."""


class Carrier(Callback):
    """Seeds each rank, puts the optimizers' state in place, and brings the results to the process that called ``fit``.

    Results of a process that Lightning has started come in files: whole, without pickle, and gone with their folder.

    Args:
        means: Has the metrics when training has ended.
        buffers: The names of those that rank 0 decides.
        seed: Seeds torch; the same on every rank, which adds its number.
        threads: CPU threads that one operation of a started process may use; None leaves it to Lightning.
        folder: Where files may be put.
        carried: The state to go on from; None to start anew.
        keep: Whether to bring the state back.
    """

    def __init__(
        self,
        means: LoggedMeans,
        *,
        buffers: Collection[str],
        seed: int,
        threads: int | None,
        folder: Path,
        carried: Carried | None,
        keep: bool,
    ) -> None:
        self._means = means
        self._buffers = buffers
        self._seed = seed
        self._threads = threads
        self._folder = folder
        self._carried = carried
        self._keep = keep
        self._caller = os.getpid()
        self._hush = Hush()
        self.arrays: dict[str, Tensor] | None = None
        """The module's arrays after training, where a strategy has divided them; None where they are in the module."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes itself at home in a process that Lightning has started."""
        if os.getpid() != self._caller:
            tempfile.tempdir = str(self._folder)  # where Lightning, too, leaves files for the caller
            end_with_caller()
            if self._threads is not None and not forks(trainer):
                torch.set_num_threads(self._threads)
        if trainer.world_size > 1:
            rest_at_exit()
        tell_started(self._folder, trainer.global_rank)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seeds torch, and restores the optimizers.

        Raises:
            ConfigurationError: The ranks were not given the same randomness.
        """
        if trainer.world_size > 1:
            seeds = gather_json(trainer, self._seed)
            if len(set(seeds)) > 1:
                raise ConfigurationError(
                    "the ranks called fit with different generators, and would train on different batches: "
                    "make them of the same seed on each rank"
                )
        torch.manual_seed((self._seed + trainer.global_rank) % 2**63)
        if self._carried is not None:
            take_up(trainer, self._carried)
            self._carried = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the ranks' models equal, and hands over the results. It is called after the metrics are made."""
        if trainer.world_size > 1:
            for name, buffer in pl_module.named_buffers():
                if own_name(name) in self._buffers:  # each rank has seen other examples
                    torch.distributed.broadcast(buffer, 0)
        if divides(trainer) and trainer.strategy.model is not None:
            self.arrays = whole_arrays(trainer.strategy.model)
        if self._keep:
            self._carried = carried_state(trainer)
        if os.getpid() != self._caller and trainer.is_global_zero:
            meta = {"means": self._means.means, "carried": self._carried[1] if self._carried else None}
            save_file(self._carried[0] if self._carried else {}, self._folder / "carried.safetensors")
            # Not write_json: a loss may be NaN.
            (self._folder / "result.json").write_text(json.dumps(meta), encoding="utf-8")

    def results(self, *, elsewhere: bool) -> tuple[dict[str, float], Carried | None]:
        """Returns the metrics, and the optimizers' state if it is kept.

        Args:
            elsewhere: Whether training ran in other processes.
        """
        if not elsewhere:
            return self._means.means, self._carried
        meta = json.loads((self._folder / "result.json").read_text(encoding="utf-8"))
        if meta["carried"] is None:
            return meta["means"], None
        return meta["means"], (load_file(self._folder / "carried.safetensors"), meta["carried"])


def carried_state(trainer: Trainer) -> Carried:
    """Returns what a further call goes on from."""
    tensors, meta = pack(
        {
            "optimizers": [_state_of(trainer, optimizer) for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
        }
    )
    return tensors, {"state": meta, "epochs": trainer.current_epoch, "steps": trainer.global_step}


def _state_of(trainer: Trainer, optimizer: Optimizer) -> dict[str, Any]:
    """Returns an optimizer's state, whole and in one form whatever the strategy."""
    model = trainer.strategy.model
    if divides(trainer) and model is not None:
        return whole_state(model, optimizer)
    return trainer.strategy.optimizer_state(optimizer)


def take_up(trainer: Trainer, carried: Carried) -> None:
    """Puts what :func:`carried_state` returned into a trainer that is about to train.

    Raises:
        ConfigurationError: The module configures other optimizers or schedulers than before.
    """
    tensors, meta = carried
    state = unpack(tensors, meta["state"])
    for kind, now in (("optimizers", trainer.optimizers), ("schedulers", trainer.lr_scheduler_configs)):
        if len(state[kind]) != len(now):
            raise ConfigurationError(
                f"the state taken up is of {len(state[kind])} {kind}, but the module configures {len(now)}"
            )
    model = trainer.strategy.model
    if divides(trainer) and model is not None:
        for optimizer, kept in zip(trainer.optimizers, state["optimizers"], strict=True):
            put_state(model, optimizer, kept)
    else:
        trainer.strategy.load_optimizer_state_dict({"optimizer_states": state["optimizers"]})
    for config, scheduler in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
        config.scheduler.load_state_dict(scheduler)
    trainer.precision_plugin.load_state_dict(state["precision"])


def count_on(trainer: Trainer, meta: dict[str, Any]) -> None:
    """Lets a trainer that has not begun count epochs and steps from where the last one ended."""
    progress: Any = trainer.fit_loop.epoch_progress  # Lightning types its counters as shorter than they are
    for epochs in (progress.total, progress.current):
        epochs.ready = epochs.started = epochs.processed = epochs.completed = meta["epochs"]
    loop = trainer.fit_loop.epoch_loop
    for steps in (
        loop.automatic_optimization.optim_progress.optimizer.step,
        loop.manual_optimization.optim_step_progress,
    ):
        steps.total.ready = steps.total.completed = meta["steps"]
