"""The devices of a torch learner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from shoal.devices import OF_TENSORFLOW, Devices, Launched, Precision
from shoal.errors import ConfigurationError

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What products are computed in."""


def check_strategy(devices: Devices) -> None:
    """Refuses what is another framework's.

    Raises:
        ConfigurationError: It is.
    """
    if devices.strategy in OF_TENSORFLOW:
        raise ConfigurationError(
            f"strategy {devices.strategy!r} is TensorFlow's: with torch use 'ddp', or a shoal.KerasLearner"
        )


def resolve(devices: Devices) -> torch.device:
    """Returns the device that ``devices`` means for this process; with ``dp`` the first of several.

    Raises:
        ConfigurationError: CUDA, or a CUDA device of that id, was asked for and is not there.
    """
    if devices.accelerator == "cpu":  # without a look, which would spoil CUDA for forked processes
        return torch.device("cpu")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices.accelerator == "auto" and devices.ids is None and devices.strategy != "dp" and not present:
        return torch.device("cpu")
    if not present and devices.strategy == "dp":
        raise ConfigurationError("strategy 'dp' copies a model among CUDA devices, and there is none: use 'ddp'")
    if not present:
        raise ConfigurationError(
            f"a CUDA device was asked for, but torch {torch.__version__} sees none; "
            "use accelerator='cpu', or install a CUDA build of torch and check `shoal doctor`"
        )
    used = cuda_ids(devices, present)
    if max(used) >= present:
        raise ConfigurationError(
            f"CUDA device {max(used)} was asked for, but there are {present}: use 0 to {present - 1}"
        )
    return torch.device("cuda", used[local_rank(devices, used)])


def cuda_ids(devices: Devices, present: int) -> Sequence[int]:
    """Returns the indices of the CUDA devices that ``devices`` means on this machine.

    Args:
        devices: What was asked for.
        present: How many there are.
    """
    if devices.ids is not None:
        return devices.ids
    if devices.strategy == "single":
        return (torch.cuda.current_device(),)
    if devices.strategy == "dp":
        return range(devices.count or present)
    place = Launched.here()
    return range(place.local_count if place else 1)


def process_devices(devices: Devices) -> list[torch.device]:
    """Returns the devices of this process, the first that of its model; several with ``dp`` alone.

    Raises:
        ConfigurationError: They are not there.
    """
    first = resolve(devices)
    if devices.strategy != "dp":
        return [first]
    return [torch.device("cuda", index) for index in cuda_ids(devices, torch.cuda.device_count())]


def local_rank(devices: Devices, used: Sequence[int]) -> int:
    """Returns which of a machine's devices is this process's.

    Raises:
        ConfigurationError: There are more processes on this machine than devices.
    """
    place = Launched.here() if devices.ranked else None
    if place is None:
        return 0
    if place.local_rank >= len(used):
        raise ConfigurationError(
            f"{place.local_count} processes were started on this machine for the CUDA devices {list(used)}: "
            "start as many as there are devices, or name more"
        )
    return place.local_rank


def may_use_cuda(devices: Devices) -> bool:
    """Tells whether ``devices`` can mean a CUDA device, without a look for one."""
    return devices.accelerator != "cpu" and bool(torch.backends.cuda.is_built())  # type: ignore[no-untyped-call]


def preload(devices: Devices) -> None:
    """Imports what torch would import at the first step, in a process that others are to be forked from.

    Raises:
        ConfigurationError: CUDA may be wanted, and was in use in the process that this one was forked from.
    """
    import torch._dynamo

    if not may_use_cuda(devices):
        with torch.autograd.profiler.record_function("preload"):  # as around each step of an optimizer
            return
    # Where it was in use, the number of devices is known already, and to ask for it does no harm.
    if torch.cuda._is_in_bad_fork() and torch.cuda.device_count():  # noqa: SLF001 - torch has no public name for it
        raise ConfigurationError(
            "CUDA was already in use in this process, and a process forked from it cannot use it: open the engine "
            "before anything touches CUDA, be it torch.cuda.is_available(), or use Devices(accelerator='cpu')"
        )


def free_memory(device: torch.device) -> int:
    """Returns how much memory is free on the device, in bytes; what torch has set aside for itself counts."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # What is free by sysconf leaves out what the files last read take, and give back.
    rows = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(rows["MemAvailable:"]) * 1024


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Returns the context in which a forward pass and its loss are computed in a precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


@contextmanager
def computing(device: torch.device, threads: int | None) -> Iterator[None]:
    """Holds cuDNN to kernels that give the same bits twice, and torch to a number of CPU threads.

    The user's own settings come back at the end.
    """
    if device.type == "cpu" and threads is None:
        yield
        return
    cudnn, before = torch.backends.cudnn, torch.get_num_threads()
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = True, False
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        if threads is not None:
            torch.set_num_threads(before)
