"""One configuration of devices to measure, and the processes in which that is done."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.devices import Accelerator, Devices, Precision, Strategy
from shoal.errors import ShoalError, WorkerError

MEMORY_SPENT = 77
"""The exit code of a rank that ran out of memory."""


class MemorySpentError(ShoalError, MemoryError):
    """A configuration needs more memory than there is."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured at a time, in processes of its own."""

    model: str
    """A name from :data:`~shoal.bench.MODELS`."""
    strategy: Strategy = "single"
    """How the model is spread."""
    count: int = 1
    """Over how many devices."""
    accelerator: Accelerator
    """``cpu`` or ``cuda``."""
    precision: Precision = "fp32"
    """Of the products."""
    batch_size: int
    """Samples of a step on each device."""
    steps: int
    """Steps that are timed."""
    threads: int | None = None
    """CPU threads of one operation on each rank; None for torch's default."""
    parts: bool = False
    """Whether forward and backward are timed too."""
    trace: str | None = None
    """A file for some steps as torch's profiler sees them on rank 0; None for none."""

    def devices(self) -> Devices:
        """The devices as a learner takes them.

        Raises:
            ConfigurationError: They cannot be.
        """
        return Devices(
            self.strategy,
            count=self.count,
            accelerator=self.accelerator,
            precision=self.precision,
            threads=self.threads,
        )

    @property
    def effective_batch(self) -> int:
        """Samples of a step on all devices."""
        return self.batch_size * self.count

    def __str__(self) -> str:
        where = self.strategy if self.strategy == "single" else f"{self.strategy} on {self.count}"
        return f"{self.model}, {where}, {self.precision}, batches of {self.batch_size}"


@dataclass(frozen=True, kw_only=True)
class Milliseconds:
    """What a part of a step takes."""

    mean: float
    """Over the steps."""
    sd: float
    """Standard deviation over the steps."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured of one configuration, after some steps that do not count."""

    samples_per_second: float
    """Of all devices together, from a start in common until all had done their part."""
    peak_bytes: tuple[int, ...]
    """The most memory on each device: of tensors on CUDA, of the process on a CPU."""
    forward: Milliseconds | None = None
    """The forward pass and the loss on rank 0, waited for; None where it was not asked for."""
    backward: Milliseconds | None = None
    """The backward pass on rank 0, with all that it sends to other ranks; likewise."""


def run_case(case: Case) -> Speed:
    """Measures a configuration in ranks that are started for it.

    Raises:
        MemorySpentError: It needs more memory than there is.
        WorkerError: A rank failed in another way.
    """
    from shoal.learners.torch_launch import RanksFailedError, launch_ranks

    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        answer = Path(folder) / "speed.json"
        asked = json.dumps(dataclasses.asdict(case))
        command = [sys.executable, "-m", "shoal.bench.rank", asked, str(answer)]
        try:
            launch_ranks(command, processes=case.count if case.devices().ranked else 1)
        except RanksFailedError as error:
            # The system kills a process that takes more than there is.
            if error.failure.code in (MEMORY_SPENT, -signal.SIGKILL):
                raise MemorySpentError(f"{case}: out of memory") from error
            last = error.failure.lines[-1] if error.failure.lines else ""
            raise WorkerError(f"{case}: {error.failure}: {last}") from error
        return _speed(json.loads(answer.read_text(encoding="utf-8")))


def _speed(told: dict[str, Any]) -> Speed:
    """Undoes ``dataclasses.asdict``."""
    parts = {name: Milliseconds(**told[name]) if told[name] else None for name in ("forward", "backward")}
    return Speed(samples_per_second=told["samples_per_second"], peak_bytes=tuple(told["peak_bytes"]), **parts)
