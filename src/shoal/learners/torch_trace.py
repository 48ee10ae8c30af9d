"""Steps recorded with torch's profiler, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from shoal.runs.files import storing, sync_file, temporary_name


@contextmanager
def recorded(path: Path, device: torch.device) -> Iterator[None]:
    """Records what this process and its device do, and writes it as Chrome's trace JSON.

    Args:
        path: The file; its folder is made if need be. Nothing is written if the steps fail.
        device: Where the model is.

    Raises:
        StorageError: The file cannot be written.
    """
    from torch.profiler import ProfilerActivity, profile

    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        yield
    temporary = path.with_name(temporary_name(path.name))
    with storing(path):
        try:
            profiler.export_chrome_trace(str(temporary))
            sync_file(temporary)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
