"""``shoal bench devices``: how fast one model trains on the devices of this machine, and how much memory it takes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.bench.case import Case, MemorySpentError, Speed, run_case
from shoal.bench.models import MODELS
from shoal.devices import Accelerator, Launched, Precision, Strategy
from shoal.errors import ConfigurationError, unknown_name

SPREADING: tuple[Strategy, ...] = ("dp", "ddp", "fsdp")
"""The strategies for several devices."""

SHORTER: dict[str, tuple[Precision, ...]] = {"cpu": ("bf16",), "cuda": ("bf16", "fp16")}
"""The precisions to compare with fp32."""

SMALLEST_BATCH = 8
"""Where a sweep over batch sizes begins."""

LARGEST_ON_CPU = 1024
"""Where it ends on a CPU, whose memory's end would be the end of other programs too."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration, and what was measured of it."""

    case: Case
    """The configuration."""
    speed: Speed | None
    """None where it needs more memory than there is."""

    def as_json(self, base: Row, epoch: int) -> dict[str, Any]:
        """Returns the row of a table.

        Args:
            base: What its speed is compared with.
            epoch: Samples of the epoch whose time is told.
        """
        case, speed = self.case, self.speed
        asked = {name: getattr(case, name) for name in ("strategy", "precision", "batch_size", "effective_batch")}
        asked |= {"devices": case.count, "out_of_memory": speed is None}
        if speed is None:
            return asked
        parts = {
            f"{name}_ms": None if part is None else dataclasses.asdict(part)
            for name, part in (("forward", speed.forward), ("backward", speed.backward))
        }
        return asked | {
            "samples_per_second": speed.samples_per_second,
            "seconds_per_epoch": epoch / speed.samples_per_second,
            "speedup": None if base.speed is None else speed.samples_per_second / base.speed.samples_per_second,
            "peak_bytes": list(speed.peak_bytes),
            **parts,
        }


@dataclass(frozen=True, kw_only=True)
class DeviceTables:
    """What was measured of one model on one machine."""

    model: str
    """Its name."""
    device: str
    """What a device is here."""
    threads: int | None
    """CPU threads of one operation on each device; None for torch's default."""
    epoch: int
    """Samples of the epoch whose time is told."""
    configurations: tuple[Row, ...]
    """Strategies and numbers of devices; the first is one device."""
    precisions: tuple[Row, ...]
    """One device in fp32 and in 16 bits."""
    sweep: tuple[Row, ...]
    """One device with growing batches; the last may have been too large for the memory."""

    def as_json(self) -> dict[str, Any]:
        """Returns all tables as JSON; speeds are compared with one device, fp32, batches of the size asked for."""
        tables = {name: getattr(self, name) for name in ("configurations", "precisions", "sweep")}
        base = self.configurations[0]
        told = {name: [row.as_json(base, self.epoch) for row in rows] for name, rows in tables.items()}
        return {"model": self.model, "device": self.device, "threads": self.threads, "epoch": self.epoch, **told}


def measure_devices(
    *,
    model: str = "mlp10m",
    batch_size: int = 64,
    steps: int = 30,
    epoch: int = 50_000,
    strategies: Sequence[str] | None = None,
    accelerator: str = "auto",
    threads: int | None = None,
    largest: int | None = None,
    trace: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
    run: Callable[[Case], Speed] = run_case,
) -> DeviceTables:
    """Measures a model's training, on random samples in the devices' memory, one configuration after the other.

    Args:
        model: A name from :data:`~shoal.bench.MODELS`.
        batch_size: Samples of a step on each device, so that more devices make a larger step.
        steps: Steps that are timed.
        epoch: Samples of the epoch whose time is told.
        strategies: Which ones, beside one device; None for all that the machine can hold.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads of one operation on each device; None: on a CPU the cores divided by the devices.
        largest: The largest batch of the sweep; None: until the memory is spent, or 1024 on a CPU.
        trace: A folder for some steps of each configuration as torch's profiler sees them; None for none.
        tell: Told what is measured next, and what was too large.
        run: Measures one configuration.

    Raises:
        ConfigurationError: A number is not positive, a name is unknown, or the devices are not there.
        WorkerError: A configuration failed, but for its memory.
    """
    if model not in MODELS:
        raise unknown_name("model", model, MODELS)
    for name, value in {"batch-size": batch_size, "steps": steps, "epoch": epoch, "largest": largest}.items():
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} must be at least 1, not {value}")
    if Launched.here() is not None:
        raise ConfigurationError("the ranks are started one configuration after the other: leave the launcher out")
    kind, device, present = _present(accelerator)
    spread = spreading(strategies, present, on_cpu=kind == "cpu")
    if kind == "cpu" and threads is None:
        threads = max(len(os.sched_getaffinity(0)) // max([count for _, count in spread], default=1), 1)
    if kind == "cpu" and largest is None:
        largest = LARGEST_ON_CPU
    one = Case(model=model, accelerator=kind, batch_size=batch_size, steps=steps, threads=threads)
    one.devices()  # what cannot be is refused before anything is measured
    full = dataclasses.replace(one, parts=True)
    cases = [full, *(dataclasses.replace(full, strategy=name, count=count) for name, count in spread)]
    measure = Measuring(run, tell)
    configurations = [measure.row(_traced(case, trace)) for case in cases]
    precisions = [measure.row(dataclasses.replace(one, precision=precision)) for precision in SHORTER[kind]]
    return DeviceTables(
        model=model,
        device=device,
        threads=threads,
        epoch=epoch,
        configurations=tuple(configurations),
        precisions=(configurations[0], *precisions),
        sweep=tuple(measure.sweep(one, largest)),
    )


class Measuring:
    """Measures configurations, of which some need too much memory.

    Args:
        run: Measures one.
        tell: Told what is measured next, and what was too large.
    """

    def __init__(self, run: Callable[[Case], Speed], tell: Callable[[str], None]) -> None:
        self._run = run
        self._tell = tell

    def row(self, case: Case) -> Row:
        """Measures one configuration."""
        self._tell(str(case))
        try:
            return Row(case=case, speed=self._run(case))
        except MemorySpentError as error:
            self._tell(str(error))
            return Row(case=case, speed=None)

    def sweep(self, case: Case, largest: int | None) -> list[Row]:
        """Doubles the batch, until it is the largest or the memory is spent.

        Args:
            case: The rest of the configuration.
            largest: Samples of the largest batch; None for no limit but the memory.
        """
        rows: list[Row] = []
        size = SMALLEST_BATCH
        while (largest is None or size <= largest) and (not rows or rows[-1].speed is not None):
            rows.append(self.row(dataclasses.replace(case, batch_size=size)))
            size *= 2
        return rows


def spreading(strategies: Sequence[str] | None, present: int, *, on_cpu: bool) -> list[tuple[Strategy, int]]:
    """Returns the strategies with numbers of devices to measure: 2, 4, 8, … as there are, and all.

    Args:
        strategies: Which ones; None for all that the machine can hold.
        present: How many devices there are.
        on_cpu: Whether they are ranks on a CPU.

    Raises:
        ConfigurationError: One is unknown, or cannot be here.
    """
    if strategies is None:
        strategies = () if present < 2 else SPREADING[1:] if on_cpu else SPREADING
    for name in strategies:
        if name not in ("single", *SPREADING):
            raise unknown_name("strategy", name, ("single", *SPREADING))
        if name == "dp" and on_cpu:
            raise ConfigurationError("strategy 'dp' copies a model among CUDA devices: on a CPU use 'ddp'")
        if name != "single" and present < 2:
            raise ConfigurationError(f"strategy {name!r} spreads a model over devices, and this machine has {present}")
    counts = {2**power for power in range(1, present.bit_length()) if 2**power <= present} | {present}
    return [(name, count) for name in SPREADING if name in strategies for count in sorted(counts)]


def _present(accelerator: str) -> tuple[Accelerator, str, int]:
    """Returns the kind of devices, their name, and how many there are; a CPU counts as two, of half the cores each.

    Raises:
        ConfigurationError: CUDA was asked for, and is not there.
    """
    import torch

    if accelerator not in ("auto", "cpu", "cuda"):
        raise unknown_name("accelerator", accelerator, ("auto", "cpu", "cuda"))
    found = torch.cuda.device_count() if accelerator != "cpu" and torch.cuda.is_available() else 0
    if found:
        return "cuda", torch.cuda.get_device_name(0), found
    if accelerator == "cuda":
        raise ConfigurationError("no CUDA device is there: use --accelerator cpu, and see `shoal doctor`")
    return "cpu", "CPU", 2


def _traced(case: Case, folder: Path | None) -> Case:
    if folder is None:
        return case
    return dataclasses.replace(case, trace=str(folder.absolute() / f"{case.strategy}-{case.count}" / "rank-0.json"))
