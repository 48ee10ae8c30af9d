"""The PyTorch learner: one training loop, with or without a federation around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from shoal.data import Dataset
from shoal.description import dataclass_fields
from shoal.devices import Devices
from shoal.errors import CannotStackError, ConfigurationError, DataError
from shoal.learners.base import ClientTrainer
from shoal.learners.batches import batch_sizes, draw_seed
from shoal.learners.labels import check_labels
from shoal.learners.schedules import Schedule
from shoal.learners.torch_client import train_client
from shoal.learners.torch_devices import autocast, check_strategy, computing, may_use_cuda, preload, resolve
from shoal.learners.torch_model import ModuleSource, ResidentModel, seeded
from shoal.learners.torch_ranked import RankedTrainer
from shoal.learners.torch_ranks import joined
from shoal.learners.torch_samples import ResidentSamples
from shoal.learners.torch_stackable import find_stacking
from shoal.learners.torch_stacked import StackedTrainer
from shoal.learners.torch_step import Batch
from shoal.learners.torch_tally import Tally
from shoal.learners.torch_training import TorchTraining
from shoal.types import Broadcast, ModelState, Params, Update

Metric = Callable[[Tensor, Tensor], Tensor]
"""``metric(output, target)`` returns the mean over a batch as a scalar tensor."""

IGNORED_LABEL = -100
"""The target that torch's cross entropy leaves out."""


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Returns the share of examples whose largest score is at the target.

    Args:
        output: Scores, shape [n, classes, …].
        target: Class indices, shape [n, …].
    """
    return (output.argmax(dim=1) == target).double().mean()


def scale_pixels(images: Tensor) -> Tensor:
    """Returns 8-bit pixels (0 to 255) as float32 in 0 to 1; a ``transform`` for :class:`TorchLearner`."""
    return images.float() / 255


@dataclass(frozen=True, eq=False)
class TorchLearner:
    """Trains and evaluates a torch module.

    Example::

        TorchLearner(Net, loss=F.cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), batch_size=10, epochs=1)

    Every call to :meth:`fit` starts from the broadcast's parameters with a new optimizer. The module must not keep
    anything outside its parameters and buffers from one batch to the next.

    Raises:
        ConfigurationError: A value is out of its range, or the model cannot be trained.
    """

    model: ModuleSource
    """A function or class that makes the module, or a module whose parameters to start from. The function is called
    with torch seeded by the run's seed."""
    _: KW_ONLY
    loss: Callable[[Any, Any], Tensor]
    """``loss(output, target)``: the mean over the batch, a scalar."""
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    """Makes any ``torch.optim`` optimizer from the trainable parameters."""
    batch_size: int | None = 32
    """Examples in a batch on each device; None for all of a client's at once."""
    accumulate: int = 1
    """How many batches on each device make one step of the optimizer, which sees the mean over all of them."""
    epochs: int = 1
    """Passes over the client's data in one call to :meth:`fit`."""
    steps: int | None = None
    """Number of batches in one call to :meth:`fit`, in place of ``epochs``."""
    schedule: Schedule | None = None
    """Multiplies the optimizer's learning rates step by step, such as :class:`~shoal.WarmupCosine`; its steps are those
    of one call to :meth:`fit`, or of a whole training. None: they stay as they are."""
    clip_norm: float | None = None
    """Largest Euclidean norm of the gradient, all parameters and the local objective together; None for no limit."""
    metrics: Mapping[str, Metric] | None = None
    """What to measure beside the loss; None: the accuracy where targets are class indices."""
    train_metrics: bool = False
    """Whether to measure ``metrics`` on the training batches too, and not only the loss."""
    transform: Callable[[Tensor], Tensor] | None = None
    """Applied to each batch of inputs on the device, such as :func:`scale_pixels`."""
    eval_batch_size: int = 512
    """Examples in a batch of :meth:`evaluate`; it changes speed and memory, not the means."""
    devices: Devices = field(default_factory=Devices)
    """Where the model lives."""
    channels_last: bool = False
    """Whether images and the weights of convolutions lie in memory channel by channel for each pixel, which GPUs with
    16 bits are faster with."""
    workers: int = 0
    """Processes that read batches ahead in :func:`~shoal.train` and on the ranks of a site, for data that are read from
    files as they are needed; 0: this process reads them."""
    compile: bool = False
    """Whether the model's forward pass goes through ``torch.compile``, as one graph: for large models that one client
    trains for long, because each process takes from seconds to minutes to compile. Dropout draws other noise than
    uncompiled. A model that cannot be compiled is refused. Clients are not stacked: for the engines ``sequential``,
    ``process`` and ``distributed``."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "epochs", "steps", "eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {value}")
        if self.steps is not None and self.epochs != 1:
            raise ConfigurationError(f"both steps={self.steps} and epochs={self.epochs} are set; leave one out")
        if self.workers < 0:
            raise ConfigurationError(f"workers must be ≥ 0, not {self.workers}")
        if self.accumulate > 1 and self.batch_size is None:
            raise ConfigurationError(f"accumulate={self.accumulate} divides a step in batches: give a batch_size")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigurationError(f"clip_norm must be > 0, not {self.clip_norm}; None means no limit")
        check_strategy(self.devices)
        if self.metrics and "loss" in self.metrics:
            raise ConfigurationError("a metric is named 'loss', as the task loss is: give it another name")

    def preload(self) -> None:
        """Imports what torch would import at the first step; without CUDA it makes the module too.

        Raises:
            ConfigurationError: CUDA was in use in the process that this one was forked from.
        """
        preload(self.devices)
        if not may_use_cuda(self.devices):
            self.resident  # noqa: B018 - made here, and inherited by the processes that are forked

    def init(self, seed: int) -> ModelState:
        """Returns the model before training, its arrays on the learner's device."""
        self.__dict__["resident"] = self._make(seed)  # the slot of the cached property
        return self.resident.state()

    def release(self) -> None:
        """Lets go of the module; whatever needs it makes it anew."""
        self.__dict__.pop("resident", None)

    def _make(self, seed: int) -> ResidentModel:
        return ResidentModel(self.model, self.device, seed, compiles=self.compile, channels_last=self.channels_last)

    def fit(self, broadcast: Broadcast, data: Dataset, rng: np.random.Generator) -> Update:
        """Trains the broadcast's model on ``data`` and returns what changed.

        The metric ``loss`` of the update is the task loss, averaged over all examples seen while training.

        Args:
            broadcast: The model to start from and the local objective.
            data: The client's examples, at least one.
            rng: Seeds torch (dropout and the like) and then draws the order of the batches.

        Raises:
            DataError: There is no example.
        """
        if len(data) == 0:
            raise DataError("there is no example to train on")
        resident = self.resident
        resident.load(broadcast.model)
        resident.module.train()
        with seeded(self.device, draw_seed(rng)), computing(self.device, self.devices.threads):
            means = train_client(self, resident, broadcast, data, rng).means()
        delta, buffers = resident.delta(broadcast.model)
        return Update(delta=delta, buffers=buffers, weight=float(len(data)), metrics=means)

    def evaluate(self, model: ModelState, data: Dataset) -> dict[str, float]:
        """Returns the loss and the metrics, as means over ``data``, with the module in evaluation mode."""
        if len(data) == 0:
            raise DataError("there is no example to evaluate on")
        resident = self.resident
        resident.load(model)
        resident.module.eval()
        tally = Tally()
        with seeded(self.device, 0), torch.no_grad(), computing(self.device, self.devices.threads):
            for start in range(0, len(data), self.eval_batch_size):
                inputs, targets = self.batch(data, np.arange(start, min(start + self.eval_batch_size, len(data))))
                with self.autocast():
                    output = resident.call(inputs)
                    loss = self.loss(output, targets)
                tally.add({"loss": loss, **self.measure(output, targets)}, len(inputs))
        return tally.means()

    def check(self, data: Dataset) -> None:
        """Tries two examples and the labels' range, so that a misfit shows before anything is written.

        Raises:
            DataError: The model or the loss does not take the data, or a label has no output.
            ConfigurationError: The model is to be compiled and cannot be.
        """
        resident = self.resident
        resident.module.eval()
        try:
            with seeded(self.device, 0), torch.no_grad():
                inputs, targets = self.batch(data, np.arange(min(2, len(data))))
                output = resident.module(inputs)
                labels = data.known_targets()
                if labels is not None and _are_class_indices(output, targets):
                    check_labels(labels, outputs=output.shape[1], ignored=IGNORED_LABEL)
                loss = self.loss(output, targets)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, DataError):
                raise
            first = str(error).strip().splitlines()[0]
            raise DataError(f"the model and the loss do not take the data: {type(error).__name__}: {first}") from error
        if loss.numel() != 1:
            raise DataError(
                f"the loss must be one number for a batch, but has shape {tuple(loss.shape)}; take its mean"
            )
        if self.compile:
            self._try_compiled(inputs, targets)

    def _try_compiled(self, inputs: Any, targets: Tensor) -> None:
        """Makes one step's gradient, and leaves no trace of it."""
        resident = self.resident
        before = resident.state()
        resident.module.train()
        try:
            with seeded(self.device, 0), self.autocast():
                self.loss(resident.call(inputs), targets).backward()  # type: ignore[no-untyped-call]
        finally:
            resident.drop_gradients()
            resident.load(before)

    def state_dict(self, model: ModelState) -> Params:
        """Returns the arrays as ``Module.load_state_dict`` takes them, tied weights under each of their names."""
        return self.resident.state_dict(model)

    def stacked(self, dataset: Dataset) -> StackedTrainer:
        """Returns what trains several clients as one program.

        Args:
            dataset: Some of its samples are tried.

        Raises:
            CannotStackError: That would not be exact, or torch cannot do it; the message names the reason.
        """
        if self.compile:
            raise CannotStackError("compile=True compiles the model of one client, not of many at once")
        if self.accumulate > 1:
            raise CannotStackError(f"accumulate={self.accumulate} takes a step's batches one after the other")
        if self.schedule is not None:
            raise CannotStackError("a schedule sets the learning rates of one client, by its own number of steps")
        return StackedTrainer(self, find_stacking(self, dataset))

    @contextmanager
    def training(self, data: Dataset, *, epochs: int, seed: int, scale_lr: bool = False) -> Iterator[TorchTraining]:
        """Begins a training on the ranks that were started for the learner's devices.

        Args:
            data: All examples.
            epochs: Passes over them.
            seed: Decides all randomness.
            scale_lr: Whether learning rates are multiplied with the effective batch by that of one device.

        Raises:
            ConfigurationError: The devices cannot be used, or not for this learner.
            DataError: There are fewer examples than devices.
            WorkerError: The other ranks did not come.
        """
        with joined(self.devices) as ranks:
            training = TorchTraining(self, data, epochs=epochs, seed=seed, ranks=ranks, scale_lr=scale_lr)
            with closing(training):
                yield training

    @contextmanager
    def together(self) -> Iterator[ClientTrainer]:
        """Opens the ranks that were started for the learner's devices, to train and evaluate for one client.

        They meet once, and spread one model over their devices, which all calls pass through; the learner's own stays
        as it is. With ``single`` it is the learner that is given.

        Raises:
            ConfigurationError: The devices cannot be used, or not for this learner.
            WorkerError: The other ranks did not come.
        """
        with joined(self.devices) as ranks:
            if self.devices.strategy == "single":
                yield self
                return
            with closing(RankedTrainer(self.on(self.devices), ranks)) as trainer:
                yield trainer

    def on(self, devices: Devices) -> Self:
        """Returns the same learner on other devices."""
        return dataclasses.replace(self, devices=devices)

    def describe(self) -> dict[str, Any]:
        """Returns what decides the learner's numbers, as JSON; the devices are left to the run's environment."""
        fields = dataclass_fields(self)
        left_out = ("devices", "eval_batch_size", "workers")
        kept = {name: fields[name] for name in fields if name not in left_out}
        return {"name": type(self).__name__, **kept, "precision": self.devices.precision}

    @cached_property
    def device(self) -> torch.device:
        """The torch device that ``devices`` means on this machine."""
        return resolve(self.devices)

    @cached_property
    def resident(self) -> ResidentModel:
        """The one module on the device that all clients pass through."""
        return self._make(seed=0)

    @cached_property
    def samples(self) -> ResidentSamples:
        """Brings samples to the device."""
        return ResidentSamples(self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context of a forward pass and its loss, in the precision of the devices."""
        return autocast(self.device, self.devices.precision)

    def step_batch(self, batch: tuple[Tensor, Tensor], factor: float) -> Batch:
        """Returns samples as a step takes them.

        Args:
            batch: Inputs and targets.
            factor: What their loss is multiplied with.
        """
        inputs, targets = batch
        return Batch(self.transformed(inputs), targets, factor)

    def batch(self, data: Dataset, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns samples as the model takes them, on the device."""
        inputs, targets = next(self.samples.batches(data, indices, [len(indices)]))
        return self.transformed(inputs), targets

    def batch_sizes(self, examples: int, devices: int = 1) -> tuple[int, ...]:
        """Returns how many examples each step of one call to ``fit`` has, for a client with so many, on all devices."""
        size = None if self.batch_size is None else self.batch_size * self.accumulate * devices
        return batch_sizes(examples, batch_size=size, epochs=self.epochs, steps=self.steps)

    def steps_per_epoch(self, examples: int, devices: int = 1) -> int:
        """Returns how many steps a pass over so many examples has, on so many devices."""
        return 1 if self.batch_size is None else -(-examples // (self.batch_size * self.accumulate * devices))

    def transformed(self, inputs: Tensor) -> Tensor:
        """Returns a batch as the model takes it."""
        inputs = self.transform(inputs) if self.transform else inputs
        if self.channels_last and inputs.ndim == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    @staticmethod
    def classifies(output: Any, targets: Tensor) -> bool:
        """Tells whether a batch's targets are class indices, and its output scores of the classes."""
        return _are_class_indices(output, targets)

    @torch.no_grad()
    def measure(self, output: Any, targets: Tensor) -> dict[str, Tensor]:
        """Returns the metrics of one batch as scalar tensors."""
        metrics = self.metrics
        if metrics is None:
            metrics = {"accuracy": accuracy} if _are_class_indices(output, targets) else {}
        return {name: metric(output, targets) for name, metric in metrics.items()}


def _are_class_indices(output: Any, targets: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.is_floating_point()
        and output.ndim == targets.ndim + 1
        and targets.dtype in (torch.int64, torch.int32, torch.uint8)
    )
