"""Whether and how a torch learner's clients can train as one program: found by trying, before the first round."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal import trees
from shoal.data import Dataset
from shoal.errors import CannotStackError
from shoal.learners.torch_devices import DTYPES, computing, free_memory
from shoal.learners.torch_memory import Pool
from shoal.learners.torch_model import BorrowedModule, seeded
from shoal.learners.torch_per_client import CONVOLUTIONS, PerClient
from shoal.learners.torch_stacked import MEMORY_SHARE, Stacking
from shoal.learners.torch_stacked_model import StackedModel, batch_means, sample_values
from shoal.learners.torch_stacked_optimizer import ELEMENT_WISE, plain_rates
from shoal.types import ModelState

if TYPE_CHECKING:
    from shoal.learners.torch import TorchLearner

SEEDS = (11, 12)
"""Seed the noise of the two clients that are tried."""

SAMPLES = 4
"""Samples of each of them; two would do, more make equal gradients by chance less likely."""

SHIFTS = 16
"""How many outputs are tried for whether a metric is a plain mean over samples."""

NOISE_FORMATS = (torch.contiguous_format, torch.preserve_format)

REASONS = (
    (r"data-dependent control flow", "its forward pass has control flow that depends on the data"),
    (r"calling \.item\(\)", "its forward pass reads a number out of a tensor (.item())"),
    (r"random operation", "its forward pass draws random numbers in another way than dropout"),
    (r"(aten::\w+|torch\.\w+)", "torch cannot run {0} for many clients at once"),
)
"""What torch's messages mean."""


def find_stacking(learner: TorchLearner, dataset: Dataset) -> Stacking:
    """Returns how the learner's clients are stacked.

    Two clients make one step, each alone and both as one program, and must have the same gradients.

    Args:
        learner: Gives the model, the loss and the optimizer.
        dataset: Has the samples to try.

    Raises:
        CannotStackError: The optimizer is not element-wise, torch cannot run the model for many clients at once, or the
            gradients differ.
    """
    _check_optimizer(learner)
    if learner.devices.precision == "fp16":
        raise CannotStackError("fp16 leaves out the steps whose gradient overflows, client by client; bf16 does not")
    resident = learner.resident
    before = resident.state()
    try:
        resident.module.train()
        with computing(learner.device, learner.devices.threads):
            return _try(learner, _Trial(learner, dataset, before))
    except CannotStackError:
        raise
    except Exception as error:
        raise CannotStackError(_reason(error)) from error
    finally:
        resident.drop_gradients()
        resident.load(before)


def _check_optimizer(learner: TorchLearner) -> None:
    optimizer = learner.optimizer(list(learner.resident.params.values()))
    if type(optimizer) not in ELEMENT_WISE:
        known = ", ".join(kind.__name__ for kind in ELEMENT_WISE[:3])
        raise CannotStackError(
            f"{type(optimizer).__name__} is not known to treat each number by itself, as {known} and others do"
        )


class _Trial:
    """Two clients with a few samples each.

    Args:
        learner: Gives the model and the loss.
        dataset: Has the samples.
        start: The model before the trial.
    """

    def __init__(self, learner: TorchLearner, dataset: Dataset, start: ModelState) -> None:
        self.learner = learner
        self.module = learner.resident.module
        self.noisy = False
        """Whether a step draws random numbers."""
        self.changing: frozenset[str] = frozenset()
        """The buffers that a step changes."""
        self.activations = 0
        """Bytes that a step keeps for the backward pass, for each sample."""
        self._start = start
        count = max(min(SAMPLES, learner.batch_size or SAMPLES, len(dataset) // 2), 1)
        picked = np.linspace(0, len(dataset) - 1, 2 * count).astype(np.int64)
        inputs, targets = (torch.as_tensor(array).to(learner.device) for array in dataset.take(picked))
        # Dealt out in turn, so that both see samples from all over.
        self.inputs = torch.stack([inputs[0::2], inputs[1::2]])
        self.targets = torch.stack([targets[0::2], targets[1::2]])

    def _weigh(self, saved: Tensor) -> Tensor:
        self.activations += saved.nbytes // len(self.inputs[0])
        return saved

    def fits(self, copies: int) -> bool:
        """Tells whether so many copies of the two clients may be tried in the memory that is free."""
        # Parameters, their gradients, and those that they are compared with.
        arrays = 3 * trees.nbytes(self.learner.resident.params)
        needed = copies * len(SEEDS) * (arrays + self.inputs.shape[1] * self.activations)
        return needed <= MEMORY_SHARE * free_memory(self.learner.device)

    def output(self, inputs: Tensor) -> Any:
        """Returns what the model gives for one client's batch."""
        return self.module(self.learner.transformed(inputs))

    def alone(self, client: int) -> list[Tensor | None]:
        """Returns the gradients of one client by itself, and notes what the step did beside."""
        resident, device = self.learner.resident, self.learner.device
        buffers = dict(self.module.named_buffers())
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        self.module.zero_grad(set_to_none=True)
        with seeded(device, SEEDS[client]):
            noise = _noise_state(device)
            self.activations = 0
            with torch.autograd.graph.saved_tensors_hooks(self._weigh, lambda tensor: tensor), self.learner.autocast():
                loss = self.learner.loss(self.output(self.inputs[client]), self.targets[client])
            loss.backward()  # type: ignore[no-untyped-call]
            self.noisy = not torch.equal(noise, _noise_state(device))
        self.changing = frozenset(name for name, buffer in buffers.items() if not torch.equal(buffer, before[name]))
        resident.load(self._start)
        return [parameter.grad for parameter in resident.params.values()]

    def together(self, stacking: Stacking, *, copies: int, rate: float | None = None) -> list[Tensor | None]:
        """Returns the gradients of both as one program, stacked.

        Args:
            stacking: How.
            copies: How many copies of the two there are.
            rate: The learning rate of steps that layers take at once, from which the gradients are found again.
        """
        device, clients = self.learner.device, copies * len(SEEDS)
        buffers = dict(self.module.named_buffers())
        params = {
            name: torch.stack([p.detach()] * clients).requires_grad_()
            for name, p in self.learner.resident.params.items()
        }
        own = {name: torch.stack([buffers[name]] * clients) for name in stacking.changing}
        layers = PerClient(stacking.convolutions[0], Pool(device), stacking.noise_format)
        layers.generators = [torch.Generator(device).manual_seed(seed) for seed in SEEDS * copies]
        layers.rates = {} if rate is None else {id(parameter): rate for parameter in params.values()}
        inputs, targets = (array.repeat(copies, *[1] * (array.ndim - 1)) for array in (self.inputs, self.targets))
        model = StackedModel(self.learner, BorrowedModule(self.module), layers)
        means = model.means({**params, **own}, inputs, targets)
        means["loss"].sum().backward()  # type: ignore[no-untyped-call]
        if rate is None:
            return [parameter.grad for parameter in params.values()]
        return [
            (start.detach() - parameter.detach()) / rate + (0 if parameter.grad is None else parameter.grad)
            for start, parameter in zip(self.learner.resident.params.values(), params.values(), strict=True)
        ]


def _noise_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _try(learner: TorchLearner, trial: _Trial) -> Stacking:
    expected = [trial.alone(client) for client in range(len(SEEDS))]
    if not trial.fits(copies=1):
        size = trees.nbytes(learner.resident.params) / 1e9
        raise CannotStackError(f"with parameters of {size:.1f} GB there is not enough free memory for two clients")
    pads = not trial.noisy and _pads(trial)
    convolves = any(isinstance(module, nn.Conv2d) for module in trial.module.modules())
    difference: str | None = None
    for noise_format in NOISE_FORMATS if trial.noisy else NOISE_FORMATS[:1]:
        stacking = Stacking(
            pads=pads,
            noisy=trial.noisy,
            noise_format=noise_format,
            changing=trial.changing,
            activations=trial.activations,
            # On CPUs a grouped convolution was 1.4 to 2.4 times as fast as the product over patches wherever it was
            # measured, and to try both would make the last bits a matter of chance.
            convolutions=CONVOLUTIONS if convolves and learner.device.type == "cuda" else CONVOLUTIONS[:1],
            smallest=2 if convolves else 1,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="There is a performance drop")  # torch would loop over clients
            found = trial.together(stacking, copies=1)
        difference = _difference(learner, expected, found)
        if difference is None:
            stacking = replace(stacking, steps_at_once=_steps_at_once(trial, stacking, expected))
            return replace(stacking, repeatable=_is_repeatable(trial, stacking, found))
    raise CannotStackError(f"as one program its gradient would differ: {difference}")


def _steps_at_once(trial: _Trial, stacking: Stacking, expected: Sequence[Sequence[Tensor | None]]) -> bool:
    """Tells whether linear layers may step their weights in the backward pass, where the optimizer is plain SGD."""
    params = list(trial.learner.resident.params.values())
    if not plain_rates(trial.learner.optimizer(params)):
        return False
    gradients = [gradient for gradient in expected[0] if gradient is not None]
    # A step about as large as the weights, from which the gradient can be found again.
    rate = _largest(params) / (_largest(gradients) or 1.0) or 1.0
    try:
        found = trial.together(stacking, copies=1, rate=rate)
    except RuntimeError:  # autograd's own, of a weight that is needed after its step
        return False
    known = [[torch.zeros_like(p) if g is None else g for p, g in zip(params, one, strict=True)] for one in expected]
    return _difference(trial.learner, known, found) is None


def _largest(arrays: Sequence[Tensor]) -> float:
    return max((float(array.detach().abs().max()) for array in arrays if array.numel()), default=0.0)


def _is_repeatable(trial: _Trial, stacking: Stacking, found: Sequence[Tensor | None]) -> bool:
    """Tells whether the clients' gradients have the same bits in larger blocks, as far as those can be tried."""
    rate = None
    if stacking.steps_at_once:  # as blocks will run, which rounds in another way than what was found
        rate = 1.0
        found = trial.together(stacking, copies=1, rate=rate)
    for copies in (2, 5):
        if not trial.fits(copies):
            return False
        larger = trial.together(stacking, copies=copies, rate=rate)
        for few, many in zip(found, larger, strict=True):
            if few is None or many is None:
                continue
            if not torch.equal(few.repeat(copies, *[1] * (few.ndim - 1)), many):
                return False
    return True


def _difference(
    learner: TorchLearner, expected: Sequence[Sequence[Tensor | None]], found: Sequence[Tensor | None]
) -> str | None:
    """Says which gradient is another one; None where all agree up to rounding."""
    names = list(learner.resident.params)
    for client, gradients in enumerate(expected):
        there = [gradient for gradient in gradients if gradient is not None]
        largest = _largest(there)
        for name, alone, stacked in zip(names, gradients, found, strict=True):
            if (alone is None) != (stacked is None):
                return f"{name} has one only {'alone' if stacked is None else 'together'}"
            if alone is None or stacked is None or not alone.numel():
                continue
            off = float((stacked[client] - alone).abs().max())
            if not off <= largest * _tolerance(learner, alone):  # also for NaN
                return f"{name} by {off:.1e} of {largest:.1e}"
    return None


def _pads(trial: _Trial) -> bool:
    """Tells whether batches may be padded: each sample's output, loss and metrics are its own."""
    samples = trial.inputs.shape[1]
    if samples < 2:
        return False
    targets = trial.targets.flatten(0, 1)
    if not targets.is_floating_point() and bool((targets < 0).any()):
        return False  # a label that the loss leaves out
    learner = trial.learner
    with torch.no_grad(), learner.autocast():
        outputs = [trial.output(inputs) for inputs in trial.inputs]
        if not all(isinstance(output, Tensor) and output.shape[:1] == (samples,) for output in outputs):
            return False
        mixed = trial.output(torch.cat([trial.inputs[0, :1], trial.inputs[1, 1:]]))
        close = _tolerance(learner, mixed)
        if not torch.allclose(mixed[0], outputs[0][0], rtol=close, atol=close):
            return False
        tried = _shifted(torch.cat(outputs), classes=not targets.is_floating_point())
        return all(_are_plain_means(learner, shifted, targets) for shifted in tried)


def _are_plain_means(learner: TorchLearner, outputs: Tensor, targets: Tensor) -> bool:
    """Tells whether the loss and the metrics of a batch are plain means over its samples."""
    together = batch_means(learner, outputs, targets)
    try:
        apart = sample_values(learner, outputs, targets)
    except Exception:  # what a user's metric raises for one sample
        return False
    return all(
        values.shape == targets.shape[:1]
        and torch.allclose(together[name], values.mean(), rtol=_tolerance(learner, values), atol=0)
        for name, values in apart.items()
    )


def _shifted(outputs: Tensor, *, classes: bool) -> Iterator[Tensor]:
    """Yields the outputs, given to other samples each time, and to other classes if they are scores of classes.

    A metric may be a mean where all predictions are wrong, and not where some are right.
    """
    axes = list(range(outputs.ndim if classes else 1))
    for shift in range(SHIFTS):
        yield outputs.roll([shift] * len(axes), axes)


def _tolerance(learner: TorchLearner, array: Tensor) -> float:
    """Returns the relative difference that rounding may make: half of the digits of the coarsest arithmetic."""
    precision = learner.devices.precision
    dtypes = [array.dtype] if precision == "fp32" else [array.dtype, DTYPES[precision]]
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def _reason(error: Exception) -> str:
    text = str(error)
    for pattern, meaning in REASONS:
        if match := re.search(pattern, text):
            return meaning.format(*match.groups())
    return f"one step of it fails: {type(error).__name__}: {text.strip().splitlines()[0] if text else ''}"
