"""Several clients as one program: their parameters stacked on a first axis, one backward pass for all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from shoal import trees
from shoal.data import Dataset
from shoal.learners.batches import draw_seed
from shoal.learners.torch_blocks import BlockData, Part, Schedule, schedule
from shoal.learners.torch_devices import computing, free_memory
from shoal.learners.torch_graphs import CudaGraphs, Recorder
from shoal.learners.torch_memory import Pool
from shoal.learners.torch_model import BorrowedModule, ObjectiveGradient
from shoal.learners.torch_per_client import Convolution, PerClient
from shoal.learners.torch_recorded import RecordedBlocks, Start, Work
from shoal.learners.torch_stacked_model import StackedModel
from shoal.learners.torch_stacked_optimizer import plain_rates, stacked_optimizer
from shoal.types import Broadcast, StackedUpdate

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner

RECORDED = ", recorded"
"""Ends the name of a variant in which blocks are recorded and replayed."""

MEMORY_SHARE = 0.5
"""The share of the free memory that a block may take by estimate; a wrong estimate costs time, not the run."""


@dataclass(frozen=True, kw_only=True)
class Stacking:
    """How a learner's clients are stacked; found by trying (see ``torch_stackable``)."""

    pads: bool
    """Whether batches of unequal size may be padded: the loss is a plain mean and no layer mixes the samples."""
    noisy: bool
    """Whether the model draws noise: it has dropout."""
    noise_format: torch.memory_format = torch.contiguous_format
    """How a dropout layer's input lies in memory when one client trains alone."""
    changing: frozenset[str] = frozenset()
    """The buffers that change in training, such as running statistics: each client has its own. All others, and the
    frozen parameters, are one copy for all."""
    activations: int = 0
    """Bytes that a step keeps for the backward pass, for each sample."""
    convolutions: tuple[Convolution, ...] = ("grouped",)
    """The ways to run the model."""
    smallest: int = 1
    """The fewest clients in a program: a grouped convolution of one group is another one, with other last bits."""
    repeatable: bool = True
    """Whether a client ends with the same bits in blocks of any size, as far as it was tried."""
    steps_at_once: bool = False
    """Whether linear layers may take a step of plain SGD in their backward pass: nothing needs the weights after."""


class StackedTrainer:
    """Trains blocks of clients for a :class:`~shoal.TorchLearner`.

    Args:
        learner: Says what to train and how.
        stacking: What was found of the learner.
        recorder: Records blocks; None for CUDA graphs on a CUDA device, and for nothing elsewhere.
    """

    def __init__(self, learner: TorchLearner, stacking: Stacking, recorder: Recorder | None = None) -> None:
        self._learner = learner
        self._stacking = stacking
        self._data = BlockData(learner.device, learner.samples)
        self._start: Start | None = None
        self._pool = Pool(learner.device)
        if recorder is None and learner.device.type == "cuda":
            recorder = CudaGraphs(learner.device)
        # Each replay would draw the same noise.
        self._recorded = None if recorder is None or stacking.noisy else RecordedBlocks(learner, recorder)

    @property
    def variants(self) -> tuple[str, ...]:
        """The ways in which a block can be run, the usual one first."""
        plain = self._stacking.convolutions
        if self._recorded is None or self._recorded.refused:
            return plain
        return (*plain, *(convolution + RECORDED for convolution in plain))

    @property
    def equal_variants(self) -> tuple[str, ...]:
        """Those of :attr:`variants` that give the bits of the usual one: a replay runs the same kernels."""
        usual = self._stacking.convolutions[0]
        return tuple(variant for variant in self.variants if variant.removesuffix(RECORDED) == usual)

    @property
    def warming_up(self) -> bool:
        """Whether the last block took longer than another like it will, because it was not replayed yet."""
        return self._recorded is not None and self._recorded.warming_up

    @property
    def pads(self) -> bool:
        """Whether batches of unequal size are padded to one, rather than run one size after the other."""
        return self._stacking.pads

    @property
    def repeatable(self) -> bool:
        """Whether a client ends with the same bits in blocks of any size, as far as it was tried."""
        return self._stacking.repeatable

    def capacity(self) -> int:
        """Returns how many clients a block may have at most for its memory, as estimated; at least 1."""
        learner = self._learner
        # Parameters, gradients, two slots of the optimizer, and what a step makes in passing.
        arrays = 5 * trees.nbytes(learner.resident.params)
        batch = (learner.batch_size or 1) * self._stacking.activations
        return max(int(MEMORY_SHARE * free_memory(learner.device)) // max(arrays + 2 * batch, 1), 1)

    def work(self, examples: int) -> int:
        """Returns how many samples a client with so many examples sees."""
        return sum(self._learner.batch_sizes(examples))

    def fit(
        self,
        broadcast: Broadcast,
        clients: Sequence[tuple[Dataset, np.random.Generator]],
        variant: str = "grouped",
    ) -> StackedUpdate:
        """Trains one block; each client ends as it would alone, but for rounding.

        The update's memory is the next block's: read it before.

        Args:
            broadcast: The model to start from and the local objective.
            clients: The examples and the generator of each, as for :meth:`~shoal.TorchLearner.fit`.
            variant: One of :attr:`variants`: here, how convolutions run, and whether blocks are replayed.

        Raises:
            MemoryError: The block does not fit the device.
        """
        try:
            with computing(self._learner.device, self._learner.devices.threads):
                return self._fit(broadcast, clients, variant)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA is one
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                if self._recorded is not None:
                    self._recorded.keep(None)  # there may be room without them
                raise MemoryError(str(error).splitlines()[0]) from error
            raise

    def settle(self, variant: str) -> None:
        """Lets go of the memory that only blocks of other variants need."""
        if self._recorded is not None:
            self._recorded.keep(variant.removesuffix(RECORDED) if variant.endswith(RECORDED) else None)

    def synchronize(self) -> None:
        """Waits until the device has done what it was given."""
        if self._learner.device.type == "cuda":
            torch.cuda.synchronize(self._learner.device)

    def _fit(
        self, broadcast: Broadcast, clients: Sequence[tuple[Dataset, np.random.Generator]], variant: str
    ) -> StackedUpdate:
        if len(clients) < self._stacking.smallest:
            (data, rng), twin = clients[0], copy.deepcopy(clients[0][1])
            return _first(self._fit(broadcast, [(data, rng), (data, twin)], variant))
        device = self._learner.device
        seeds = [draw_seed(rng) for _, rng in clients]
        noisy = self._stacking.noisy
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds] if noisy else []
        examples = [len(data) for data, _ in clients]
        plan = self._plan(examples)
        batches = self._data.load(clients, plan)
        start = self._started(broadcast)
        work = Work(plan, batches, cast("Convolution", variant.removesuffix(RECORDED)), generators)
        self._pool.keep(len(clients))
        if self._recorded is None or not variant.endswith(RECORDED):
            return self._run(start, work, self._pool)
        return self._recorded.fit(start, work, self._run, self._pool)

    def _run(self, start: Start, work: Work, pool: Pool) -> StackedUpdate:
        """Trains a block in memory of the pool."""
        learner, plan, clients = self._learner, work.plan, len(work.plan.examples)
        layers = PerClient(work.convolution, pool, self._stacking.noise_format)
        model = StackedModel(learner, start.borrowed, layers)
        program = _Block(learner, model, start, _stacks(start, clients, pool), pool)
        layers.rates = program.rates() if self._stacking.steps_at_once else {}
        sums: dict[str, Tensor] = {}
        for number, parts in enumerate(plan.steps):
            total: Tensor | None = None
            for part in parts:
                inputs, targets, masks = work.batches(part)
                layers.generators = work.generators_of(part.rows)
                means = program.means(part, inputs, targets, masks)
                total = means["loss"].sum() if total is None else total + means["loss"].sum()
                for name, values in means.items():
                    _add_part(sums, name, part, values.detach().flatten(), clients)
            if total is not None:
                total.backward()  # type: ignore[no-untyped-call]
            program.step()
            program.release()
            program.keep(plan.ends.get(number, ()))
        seen = plan.samples(learner.device)
        return program.update(plan.examples, {name: total / seen for name, total in sums.items()})

    def _plan(self, examples: Sequence[int]) -> Schedule:
        """Returns the steps of a block whose clients have so many examples."""
        sizes = {count: self._learner.batch_sizes(count) for count in set(examples)}
        return schedule([sizes[count] for count in examples], examples, pads=self._stacking.pads)

    def _started(self, broadcast: Broadcast) -> Start:
        """Returns what each client starts from, and loads what all clients share into the module, once a round."""
        resident = self._learner.resident
        if self._start is None or self._start.broadcast is not broadcast:
            resident.load(broadcast.model)
            buffers = dict(resident.module.named_buffers())
            own = {name: buffers[name].detach().clone() for name in sorted(self._stacking.changing)}
            arrays = {**resident.on_device(broadcast.model.params), **own}
            self._start = Start(broadcast, arrays, BorrowedModule(resident.module))
        resident.module.train()  # an evaluation may have come between
        return self._start


class _Block:
    """The stacked model of one block, from the broadcast to the update.

    Args:
        learner: Says what to train and how.
        model: The model for many clients.
        start: What each client starts from.
        stacks: The same, once for each client.
        pool: Takes the gradients' memory after each step.
    """

    def __init__(
        self, learner: TorchLearner, model: StackedModel, start: Start, stacks: Mapping[str, Tensor], pool: Pool
    ) -> None:
        resident = learner.resident
        self._learner = learner
        self._model = model
        self._start = start
        self._pool = pool
        # Leaves of their own, because the memory outlives them.
        self._params = {name: stacks[name].detach().requires_grad_() for name in resident.params}
        self._buffers = {name: stack for name, stack in stacks.items() if name not in resident.params}
        self._sent = [name for name in self._buffers if name in resident.buffers]
        self._objective = ObjectiveGradient(start.broadcast, resident, self._params)
        self._final: dict[str, Tensor] | None = None
        stacked = {id(resident.params[name]): parameter for name, parameter in self._params.items()}
        self._optimizer = stacked_optimizer(learner.optimizer(list(resident.params.values())), stacked)

    def means(self, part: Part, inputs: Tensor, targets: Tensor, masks: Tensor | None) -> dict[str, Tensor]:
        """Returns the loss and the metrics of each of the part's clients on its batch, [clients of the part] each."""
        state = {**self._params, **self._buffers}
        if part.rows is not None:
            rows = torch.as_tensor(part.rows, device=inputs.device)
            state = {name: stacked[rows] for name, stacked in state.items()}
        means = self._model.means(state, inputs, targets, masks)
        if part.rows is not None:
            for name, stacked in self._buffers.items():
                stacked[rows] = state[name]
        return means

    def rates(self) -> dict[int, float]:
        """Returns the learning rates of the parameters whose step needs their gradient alone, by their ids."""
        if self._objective.active or self._learner.clip_norm is not None:
            return {}
        return plain_rates(self._optimizer)

    def step(self) -> None:
        """Takes one optimizer step on the gradients of all clients."""
        self._objective.add()
        gradients = [p.grad for p in self._params.values() if p.grad is not None]
        if self._learner.clip_norm is not None:
            _clip_rows(gradients, self._learner.clip_norm)
        if gradients:  # the layers have not taken all steps
            self._optimizer.step()

    def release(self) -> None:
        """Lets go of the gradients."""
        for parameter in self._params.values():
            if parameter.grad is not None:
                self._pool.give(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def keep(self, rows: Sequence[int]) -> None:
        """Sets the arrays of clients aside that have made their last step, while the block goes on without them."""
        if not len(rows):
            return
        stacked = {**self._params, **self._buffers}
        if self._final is None:
            self._final = {name: torch.empty_like(array) for name, array in stacked.items()}
        index = torch.as_tensor(rows, device=self._learner.device)
        for name, array in stacked.items():
            self._final[name][index] = array.detach()[index]

    @torch.no_grad()
    def update(self, examples: np.ndarray, metrics: Mapping[str, Tensor]) -> StackedUpdate:
        """Returns what the clients send back; the block is of no use afterwards."""
        stacked = self._final or {name: array.detach() for name, array in {**self._params, **self._buffers}.items()}
        arrays = {name: stacked[name] for name in (*self._params, *self._sent)}
        device = self._learner.device
        finite = torch.ones(len(examples), dtype=torch.bool, device=device)
        for name, array in arrays.items():
            array.sub_(self._start.arrays[name])  # in place: no copy of the block
            finite &= torch.isfinite(array.flatten(1).sum(1))
        if device.type != "cpu" or not bool(finite.all()):  # on a CPU it costs nothing to look
            for array in arrays.values():
                array.masked_fill_(~finite.view(-1, *[1] * (array.ndim - 1)), 0)
        return StackedUpdate(
            delta={name: arrays[name] for name in self._params},
            buffers={name: arrays[name] for name in self._sent},
            weights=examples.astype(np.float64),
            metrics=metrics,
            finite=finite,
        )


def _stacks(start: Start, clients: int, pool: Pool) -> dict[str, Tensor]:
    """Returns a copy of what each client starts from for each of them, lent by the pool."""
    return {
        name: pool.lend((clients, *array.shape), array.dtype).copy_(array.detach())
        for name, array in start.arrays.items()
    }


@torch.no_grad()
def _clip_rows(gradients: Sequence[Tensor], largest: float) -> None:
    """Scales each client's gradient down to a Euclidean norm, as ``torch.nn.utils.clip_grad_norm_`` does for one."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (largest / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1)))


def _first(update: StackedUpdate) -> StackedUpdate:
    """Returns the first client's part of an update, still stacked."""
    return StackedUpdate(
        delta={name: array[:1] for name, array in update.delta.items()},
        buffers={name: array[:1] for name, array in update.buffers.items()},
        weights=update.weights[:1],
        metrics={name: array[:1] for name, array in update.metrics.items()},
        finite=update.finite[:1],
    )


def _add_part(sums: dict[str, Tensor], name: str, part: Part, means: Tensor, clients: int) -> None:
    """Adds the means of a part's clients, times their examples, to the sum over the steps, [clients]."""
    if name not in sums:
        sums[name] = torch.zeros(clients, dtype=torch.float64, device=means.device)
    amounts = means.double() * part.examples(means.device)
    if part.rows is None:
        sums[name] += amounts
    else:
        sums[name][torch.as_tensor(part.rows, device=means.device)] += amounts
