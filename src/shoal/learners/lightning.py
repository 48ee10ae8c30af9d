"""The Lightning learner: the user's own module, trainer options and strategies under any algorithm."""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from shoal.data import Dataset, Subset
from shoal.description import dataclass_fields
from shoal.devices import Devices, Launched
from shoal.errors import ConfigurationError, DataError, MissingExtraError
from shoal.learners.base import ClientTrainer
from shoal.learners.batches import batch_sizes, draw_order, draw_seed
from shoal.learners.torch_devices import computing, may_use_cuda, preload
from shoal.learners.torch_model import ResidentModel, seeded
from shoal.learners.torch_ranks import Ranks, joined
from shoal.types import Broadcast, ModelState, Params, Update

try:
    from lightning.pytorch import LightningModule
except ModuleNotFoundError as missing:
    raise MissingExtraError("lightning", purpose="train a LightningModule", extra="lightning") from missing

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from shoal.learners.lightning_carrier import Carried, Carrier, count_on
from shoal.learners.lightning_devices import PLACING, device_count, devices_of, options_on
from shoal.learners.lightning_metrics import LoggedMeans
from shoal.learners.lightning_objective import LocalObjectiveCallback, arrays_of, changed
from shoal.learners.lightning_samples import ClientSamples, EqualExamples, loader, portable
from shoal.learners.lightning_sharded import check_divisible, divides
from shoal.learners.lightning_trainer import (
    check_options,
    fit_trainer,
    launched,
    one_device_trainer,
    quietly,
    starts_processes,
)
from shoal.learners.lightning_training import LightningTraining

CPU = torch.device("cpu")

OWNED_BY_LOADER = (
    "dataset",
    "batch_size",
    "shuffle",
    "sampler",
    "batch_sampler",
    "drop_last",
    "generator",
    "collate_fn",
)
"""Arguments of a ``DataLoader`` that decide which samples come, and in what order."""


@dataclass(frozen=True, eq=False)
class LightningLearner:
    """Trains and evaluates a ``LightningModule`` with the user's own ``Trainer`` options.

    Example::

        LightningLearner(LitNet, trainer={"strategy": "ddp_spawn", "devices": 2, "accelerator": "cpu"}, batch_size=32)

    Batches are pairs ``(inputs, targets)``. Each call has a new trainer and a copy of the module, so that one client
    leaves nothing to the next. It is quiet: no progress bar, checkpoints, logger, summary or hints, unless the trainer
    options ask for them.

    With several ranks a global batch has ``batch_size`` times as many examples as there are ranks, of which each rank
    has its share; so two ranks equal one device with twice the batch size. Where a batch does not divide, the ranks'
    gradients are weighted by their examples: for a loss that is a mean over the batch the step is still exactly that of
    one device. What is no mean over examples, such as BatchNorm's statistics, sees only a rank's own share, and the
    buffers are rank 0's.

    Strategies that start processes from a function (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``) work anywhere, the
    first where the module's class can be imported. ``ddp`` and ``fsdp`` work under torchrun or Slurm, where every rank
    calls :meth:`fit` and gets the same update, whole. Other strategies that divide the parameters are refused, because
    nothing gathers them here. A rank that dies ends the call with an error; forked ranks compute with one CPU thread
    each.

    Raises:
        ConfigurationError: A value is out of its range, or an option cannot be used here.
    """

    model: LightningModule | Callable[[], LightningModule]
    """A function or class that makes the module, or a module whose parameters to start from. The function is called
    with torch seeded by the run's seed."""
    _: KW_ONLY
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Options for ``Trainer``. Callbacks, strategies and plugins are copied for each call, so that they start anew."""
    batch_size: int | None = 32
    """Examples in a batch of one device; None for all of a client's at once, divided among the ranks."""
    epochs: int = 1
    """Passes over the client's data in one call to :meth:`fit`."""
    steps: int | None = None
    """Number of batches in one call to :meth:`fit`, in place of ``epochs``; with the trainer's
    ``accumulate_grad_batches`` an optimizer makes fewer steps."""
    loaders: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``DataLoader``, such as ``num_workers`` and ``pin_memory``."""
    eval_batch_size: int = 512
    """Examples in a batch of :meth:`evaluate`."""
    keep_optimizer: bool = False
    """Whether optimizers, schedulers and the counts of epochs and steps go on from the last call to :meth:`fit`,
    whoever's data that had: for one site or for central training. See :meth:`carried`. Otherwise they start anew."""
    threads: int | None = None
    """CPU threads that one operation may use, ≥ 1; None leaves it to torch, and in started processes to Lightning."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "steps", "eval_batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {value}")
        if self.steps is not None and self.epochs != 1:
            raise ConfigurationError(f"both steps={self.steps} and epochs={self.epochs} are set; leave one out")
        check_options(self.trainer)
        for name in self.loaders:
            if name in OWNED_BY_LOADER:
                raise ConfigurationError(
                    f"loaders={{{name!r}: …}} cannot be used here: the learner draws the batches, so that they are the "
                    "same on every engine"
                )

    @property
    def devices(self) -> Devices:
        """What the trainer options say of devices.

        The strategy is ``single`` for one device, and for strategies that start processes from a function, which are
        one process from outside.
        """
        return devices_of(self.trainer, self.threads)

    def on(self, devices: Devices) -> Self:
        """Returns the same learner with other devices, precision or number of threads in its trainer options.

        With ``ddp`` and ``fsdp`` the trainer has the devices of this machine that a launcher has started processes for.

        Raises:
            ConfigurationError: Lightning has no such strategy, or not there; or the trainer options hold another one as
                an object.
        """
        options = options_on(self.trainer, devices)
        return dataclasses.replace(self, trainer=options, threads=devices.threads)

    def preload(self) -> None:
        """Makes the module, and imports what torch would import at the first step.

        Raises:
            ConfigurationError: The trainer uses several devices; or the optimizer's state is to be kept, which would
                end with a forked process; or CUDA was in use in the process that this one was forked from.
        """
        preload(self.devices)
        if self.keep_optimizer:
            raise ConfigurationError("keep_optimizer=True keeps state that ends with a child process: use 'sequential'")
        if fit_trainer(self.trainer).world_size > 1:
            raise ConfigurationError("the trainer uses several devices, each in a process of its own: use 'sequential'")
        if not may_use_cuda(self.devices):
            self.first  # noqa: B018 - made here, and inherited by the processes that are forked

    def init(self, seed: int) -> ModelState:
        """Returns the model before training, its arrays on the CPU."""
        first = ResidentModel(self.model, CPU, seed)
        if not isinstance(first.module, LightningModule):
            raise ConfigurationError(
                f"the model must be a LightningModule or make one, not {type(first.module).__name__}: use TorchLearner "
                "for other modules"
            )
        self.__dict__["first"] = first  # the slot of the cached property
        return first.state()

    def fit(self, broadcast: Broadcast, data: Dataset, rng: np.random.Generator) -> Update:
        """Trains the broadcast's model on ``data`` and returns what changed.

        The metrics are what the module logged with ``self.log``: means over the examples, all passes and ranks.

        Args:
            broadcast: The model to start from and the local objective.
            data: The client's examples, at least one.
            rng: Seeds torch and then draws the order of the batches; on each rank of a launcher one of the same seed.

        Raises:
            DataError: There is no example.
            WorkerError: A rank failed or died.
        """
        if len(data) == 0:
            raise DataError("there is no example to train on")
        arrays, means, divided = self._train(broadcast, data, rng)
        if divided:
            gc.collect()  # the wrapped module refers to itself, and still has its part of the device
        delta, buffers = changed(arrays, broadcast.model)
        return Update(delta=delta, buffers=buffers, weight=float(len(data)), metrics=means)

    def _train(
        self, broadcast: Broadcast, data: Dataset, rng: np.random.Generator
    ) -> tuple[Mapping[str, Tensor], dict[str, float], bool]:
        """Returns the arrays after training, the metrics, and whether the module was divided."""
        module: Any = self._copy(broadcast.model).module
        with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
            trainer, samples, carrier = self._prepare(broadcast, data, rng, Path(folder))
            check_divisible(trainer, module)
            elsewhere = starts_processes(trainer)
            device = CPU if elsewhere else trainer.strategy.root_device
            with quietly(), self._computing(device), launched(trainer, Path(folder)):
                trainer.fit(module, datamodule=samples)
            means, carried = carrier.results(elsewhere=elsewhere)
        if self.keep_optimizer:
            self.__dict__["_carried"] = carried
        return carrier.arrays or arrays_of(module), means, divides(trainer)

    def evaluate(self, model: ModelState, data: Dataset) -> dict[str, float]:
        """Returns what the module's ``validation_step`` logs, as means over ``data``.

        It runs on the first of the trainer's devices, under a launcher on each rank's own, so that no example counts
        twice; the whole model must fit there. The user's callbacks and loggers are left out. A module without
        ``validation_step`` has its ``test_step`` run.

        Raises:
            DataError: There is no example.
            ConfigurationError: The module has neither.
        """
        if len(data) == 0:
            raise DataError("there is no example to evaluate on")
        module: Any = self._copy(model).module
        batches = np.split(np.arange(len(data)), range(self.eval_batch_size, len(data), self.eval_batch_size))
        trainer = one_device_trainer(self.trainer)
        with quietly(), self._computing(trainer.strategy.root_device):
            run = self._evaluation(trainer, module)
            run(module, dataloaders=loader(data, batches, self.loaders), verbose=False)
            return {name: float(value) for name, value in trainer.callback_metrics.items()}

    def together(self) -> AbstractContextManager[ClientTrainer]:
        """Returns the learner itself: in each call its Trainer joins the ranks that a launcher has started."""
        return nullcontext(self)

    def check(self, data: Dataset) -> None:
        """Trains a copy on two examples, those with the least and the largest label if labels are known, on the CPU.

        Raises:
            DataError: The module does not take the data.
            ConfigurationError: The trainer options cannot be.
        """
        check_divisible(fit_trainer(self.trainer), cast("LightningModule", self.first.module))
        labels = data.known_targets()
        ends = np.arange(min(2, len(data)))
        if labels is not None and labels.ndim == 1 and len(data):
            ends = np.unique([np.argmin(labels), np.argmax(labels)] if len(np.unique(labels)) > 1 else ends)
        module: Any = self._copy(self.first.state()).module
        try:
            with quietly(), self._computing(CPU):
                quick = one_device_trainer({}, accelerator="cpu", max_epochs=1, limit_val_batches=0)
                quick.fit(module, loader(Subset(data, ends), [np.arange(len(ends))], {}))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, ConfigurationError):
                raise
            first = str(error).strip().splitlines()[0]
            raise DataError(f"the module does not take the data: {type(error).__name__}: {first}") from error

    @contextmanager
    def training(self, data: Dataset, *, epochs: int, seed: int, scale_lr: bool = False) -> Iterator[LightningTraining]:
        """Begins a training, epoch by epoch; optimizers and schedulers go on from one to the next.

        With ``ddp`` and ``fsdp`` all ranks that a launcher has started call this, with the same arguments. Strategies
        that start processes start them anew for each epoch.

        Args:
            data: All examples.
            epochs: Passes over them.
            seed: Decides all randomness.
            scale_lr: Must be False: the learning rates are the module's own.

        Raises:
            ConfigurationError: Rates are to be scaled, or a launcher has started processes that the trainer has no
                devices for.
            WorkerError: The other ranks did not come.
        """
        if scale_lr:
            raise ConfigurationError("scale_lr is for a TorchLearner: a LightningModule makes its own optimizers")
        learner = dataclasses.replace(self, epochs=1, steps=None, keep_optimizer=True)
        devices = fit_trainer(self.trainer).world_size
        place = Launched.here()
        # One process has no one to join, and CUDA may have to stay untouched in it.
        with joined(self.devices) if place is not None and place.count > 1 else nullcontext(Ranks()) as ranks:
            try:
                yield LightningTraining(learner, data, epochs=epochs, seed=seed, devices=devices, ranks=ranks)
            finally:
                gc.collect()  # Lightning's wrappers must not outlive the ranks' group

    def carried(self) -> Carried:
        """Returns the state of optimizers, schedulers and counters after the last :meth:`fit`, to be saved.

        Returns:
            Tensors by name, as safetensors takes them, and JSON; both empty before the first call.

        Raises:
            ConfigurationError: The learner does not keep it.
        """
        if not self.keep_optimizer:
            raise ConfigurationError("the optimizer's state was thrown away: make the learner with keep_optimizer=True")
        tensors, meta = self.__dict__.get("_carried") or ({}, {})
        return dict(tensors), dict(meta)

    def take_up(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Lets the next :meth:`fit` go on from what :meth:`carried` returned.

        Raises:
            ConfigurationError: The learner does not keep the optimizer's state.
        """
        if not self.keep_optimizer:
            raise ConfigurationError(
                "there is no use for an optimizer's state: make the learner with keep_optimizer=True"
            )
        self.__dict__["_carried"] = (dict(tensors), dict(meta)) if meta else None

    def state_dict(self, model: ModelState) -> Params:
        """Returns the arrays as ``LightningModule.load_state_dict`` takes them."""
        return self.first.state_dict(model)

    def describe(self) -> dict[str, Any]:
        """Returns what decides the learner's numbers, as JSON; the devices are left to the run's environment."""
        fields = dataclass_fields(self)
        left_out = ("eval_batch_size", "loaders", "threads")
        kept = {name: fields[name] for name in fields if name not in left_out}
        kept["trainer"] = {name: option for name, option in kept["trainer"].items() if name not in PLACING}
        kept["batch_size"] = self.batch_size and self.batch_size * (device_count(self.trainer) or 1)  # of all ranks
        return {"name": type(self).__name__, **kept}

    @cached_property
    def first(self) -> ResidentModel:
        """The module before training; never trained itself."""
        self.init(seed=0)
        made: ResidentModel = self.__dict__["first"]
        return made

    @contextmanager
    def _computing(self, device: torch.device) -> Iterator[None]:
        """Leaves torch's generators, threads and cuDNN as they are now, whatever the block does to them."""
        flags = nullcontext() if "benchmark" in self.trainer else computing(device, None)
        with seeded(device, 0), computing(CPU, self.threads), flags:  # in training the carrier seeds once more
            yield

    def _copy(self, model: ModelState) -> ResidentModel:
        """Returns a copy of the module that holds the model's arrays."""
        resident = ResidentModel(self.first.module, CPU, seed=0)
        resident.load(model)
        return resident

    def _prepare(
        self, broadcast: Broadcast, data: Dataset, rng: np.random.Generator, folder: Path
    ) -> tuple[Trainer, ClientSamples, Carrier]:
        """Returns what one call trains with."""
        carried: Carried | None = self.__dict__.get("_carried")
        seed = draw_seed(rng)
        samples = ClientSamples(data, self.loaders, seed)
        means = LoggedMeans(samples.examples)
        carrier = Carrier(
            means,
            buffers=tuple(broadcast.model.buffers),
            seed=seed,
            threads=self.threads,
            folder=folder,
            carried=carried,
            keep=self.keep_optimizer,
        )
        trainer = fit_trainer(self.trainer, [EqualExamples(samples), LocalObjectiveCallback(broadcast), means, carrier])
        if starts_processes(trainer):
            samples.data = portable(data)
        samples.passes = self._passes(len(data), trainer.world_size, rng)
        if carried is not None:
            samples.first_epoch = carried[1]["epochs"]
            count_on(trainer, carried[1])
        trainer.fit_loop.max_epochs = samples.first_epoch + len(samples.passes)
        return trainer, samples, carrier

    def _passes(self, examples: int, ranks: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
        """Returns the batches of all ranks together, pass by pass."""
        size = self.batch_size and self.batch_size * ranks
        sizes = batch_sizes(examples, batch_size=size, epochs=self.epochs, steps=self.steps)
        batches = np.split(draw_order(examples, sum(sizes), rng), np.cumsum(sizes[:-1]))
        one_pass = math.ceil(examples / min(size or examples, examples))
        return [batches[start : start + one_pass] for start in range(0, len(batches), one_pass)]

    def _evaluation(self, trainer: Trainer, module: LightningModule) -> Callable[..., Any]:
        if is_overridden("validation_step", module):
            return trainer.validate
        if is_overridden("test_step", module):
            return trainer.test
        raise ConfigurationError(
            f"{type(module).__name__} has no validation_step and no test_step to evaluate with: write one that logs "
            "what you want to know with self.log"
        )
