"""``python -m shoal.bench.rank CASE FILE``: one rank of a configuration that is measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.bench.case import MEMORY_SPENT, Case, Milliseconds, Speed
from shoal.bench.models import MODELS, random_samples
from shoal.data import Dataset, Subset
from shoal.learners.base import OngoingTraining
from shoal.learners.torch import TorchLearner
from shoal.learners.torch_devices import cuda_ids, resolve
from shoal.runs import write_json

LEARNING_RATE = 0.01

WARM_UP = 5
"""Steps before the clock starts: the first ones look for memory and kernels."""

TRACE_STEPS = 5
"""Steps that are recorded."""

DIFFERENT = 2048
"""How many samples there are in memory; an epoch sees them again and again, so that they weigh little."""

EPOCH = 20_000
"""Samples of an epoch at least."""

INTERRUPTED = 130
"""The exit code of a rank that Ctrl-C has ended."""

FOREVER = 10**6
"""Epochs that are never reached."""


class Stopwatch:
    """Times the parts of a step from within it, by what the learner calls of the user's.

    Args:
        device: Waited for at each mark.
    """

    def __init__(self, device: torch.device) -> None:
        self.running = False
        """Whether it times; each mark costs the device its head start."""
        self.forward: list[float] = []
        self.backward: list[float] = []
        self._device = device
        self._mark = 0.0

    def transform(self, inputs: Tensor) -> Tensor:
        """Takes the beginning of the forward pass."""
        if self.running:
            self._since()
        return inputs

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross entropy, and takes the end of the forward pass."""
        loss = F.cross_entropy(output, targets)
        if self.running:
            self.forward.append(self._since())
        return loss

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Returns SGD, whose steps take the end of the backward pass."""
        optimizer = torch.optim.SGD(params, lr=LEARNING_RATE)
        optimizer.register_step_pre_hook(lambda *_: self.backward.append(self._since()) if self.running else None)
        return optimizer

    def _since(self) -> float:
        """Returns the milliseconds since the last mark."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        return 1e3 * passed


def measure(case: Case) -> tuple[int, Speed]:
    """Measures a configuration; all of its ranks call this.

    Returns:
        Which rank this is, and what was measured.
    """
    watch = Stopwatch(resolve(case.devices()))
    learner = TorchLearner(
        MODELS[case.model].make,
        loss=watch.loss,
        optimizer=watch.optimizer,
        transform=watch.transform,
        batch_size=case.batch_size,
        devices=case.devices(),
    )
    with learner.training(_samples(case), epochs=FOREVER, seed=0) as ongoing:
        _advance(ongoing, WARM_UP)
        started = time.perf_counter()
        _advance(ongoing, case.steps)
        seconds = time.perf_counter() - started
        peaks = _peaks(ongoing, learner)
        if case.parts:
            watch.running = True
            _advance(ongoing, case.steps)
            watch.running = False
        if case.trace is not None:
            leads = ongoing.rank == 0
            with ongoing.recorded(Path(case.trace)) if leads else contextlib.nullcontext():
                _advance(ongoing, TRACE_STEPS)
        return ongoing.rank, Speed(
            samples_per_second=case.steps * case.effective_batch / seconds,
            peak_bytes=peaks,
            forward=_milliseconds(watch.forward),
            backward=_milliseconds(watch.backward),
        )


def _samples(case: Case) -> Dataset:
    """Returns random samples, whole steps of them."""
    different = random_samples(MODELS[case.model], DIFFERENT)
    steps = -(-EPOCH // case.effective_batch)
    return Subset(different, np.arange(steps * case.effective_batch) % DIFFERENT)


def _advance(ongoing: OngoingTraining, steps: int) -> None:
    until = ongoing.step + steps
    while ongoing.step < until:  # it pauses at the end of an epoch
        ongoing.advance(until)


def _peaks(ongoing: OngoingTraining, learner: TorchLearner) -> tuple[int, ...]:
    if learner.devices.strategy == "dp":  # one rank for several devices
        ids = cuda_ids(learner.devices, torch.cuda.device_count())
        return tuple(torch.cuda.max_memory_allocated(index) for index in ids)
    return tuple(int(peak) for peak, _ in ongoing.usage())


def _milliseconds(times: list[float]) -> Milliseconds | None:
    if not times:
        return None
    return Milliseconds(mean=statistics.fmean(times), sd=statistics.pstdev(times))


def is_memory_error(error: BaseException) -> bool:
    """Tells whether there was not enough memory, on the device or on the CPU."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def main(arguments: list[str]) -> int:
    """Measures one case, and writes what rank 0 found; returns the exit code.

    Args:
        arguments: The case and the file, as :func:`~shoal.bench.case.run_case` gives them.
    """
    try:
        rank, speed = measure(Case(**json.loads(arguments[0])))
    except (RuntimeError, MemoryError) as error:
        if is_memory_error(error):
            return MEMORY_SPENT
        raise
    except KeyboardInterrupt:  # the launcher says so, once for all ranks
        return INTERRUPTED
    if rank == 0:
        write_json(Path(arguments[1]), dataclasses.asdict(speed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
