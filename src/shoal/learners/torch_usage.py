"""What a training takes of its device."""

from __future__ import annotations

import resource
import time

import torch


class Usage:
    """Peak memory, and how busy the device is.

    Args:
        device: Which one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._busy: list[float] = []
        self._looked = time.perf_counter(), time.process_time()

    def look(self) -> None:
        """Takes a sample of how busy the device is, or the CPU was since the last one."""
        now = time.perf_counter(), time.process_time()
        if self._device.type == "cuda":
            share = _cuda_share(self._device)
        else:
            share = (now[1] - self._looked[1]) / max(now[0] - self._looked[0], 1e-9)
        if share is not None:
            self._busy.append(share)
        self._looked = now

    def read(self) -> tuple[float, float]:
        """Returns the peak memory since the last call in bytes, and the mean share of time; NaN where unknown.

        On CUDA the memory is what tensors took; on a CPU it is the process's, from its beginning. The share may be
        above 1 on a CPU, where several cores count.
        """
        if self._device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        busy = sum(self._busy) / len(self._busy) if self._busy else float("nan")
        self._busy.clear()
        return peak, busy


def _cuda_share(device: torch.device) -> float | None:
    """Returns how busy a CUDA device was in the last moments; None where the library that knows is missing."""
    try:
        return torch.cuda.utilization(device) / 100
    except (ImportError, RuntimeError):  # no nvidia-ml-py, or the driver does not say
        return None
