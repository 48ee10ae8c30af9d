"""A trainer's options in the words of :class:`~shoal.Devices`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from shoal.devices import Accelerator, Devices, Launched, Precision, Strategy
from shoal.errors import ConfigurationError
from shoal.learners.torch_devices import may_use_cuda

ACCELERATORS: Mapping[str, Accelerator] = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
"""Lightning's names of accelerators in those of :class:`~shoal.Devices`."""

PRECISIONS: Mapping[Any, Precision] = {
    "bf16-mixed": "bf16",
    "bf16": "bf16",
    "16-mixed": "fp16",
    16: "fp16",
    "16": "fp16",
}
"""Lightning's names of precisions in those of :class:`~shoal.Devices`; the others are the trainer's alone."""

MIXED = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""The precisions of :class:`~shoal.Devices` in Lightning's names."""

PLACING = frozenset({"accelerator", "devices", "num_nodes", "strategy"})
"""The trainer options that say where a training runs, and not what it computes."""

STARTING = ("spawn", "fork", "notebook")
"""What is in the names of strategies that start processes from a function: seen from outside they are one process."""


def devices_of(options: Mapping[str, Any], threads: int | None) -> Devices:
    """Returns what trainer options say of devices.

    Args:
        options: The user's.
        threads: CPU threads that one operation may use.
    """
    accelerator = _accelerator(options)
    precision = PRECISIONS.get(options.get("precision"), "fp32")
    strategy, count, ids = _family(options), device_count(options), _ids(options)
    if count == 1 or strategy == "single":
        strategy, count = "single", None
    alone = strategy == "single" and ids is not None and len(ids) > 1  # ranks of a strategy that starts them
    return Devices(
        strategy,
        count=count,
        accelerator=accelerator,
        ids=None if alone or accelerator == "cpu" else ids,
        precision=precision,
        threads=threads,
    )


def device_count(options: Mapping[str, Any]) -> int | None:
    """Returns how many devices trainer options mean, on all machines together; None where the machine decides."""
    ids, devices = _ids(options), options.get("devices", "auto")
    if ids is not None:
        local = len(ids)
    elif devices in {"auto", -1, "-1"}:
        if may_use_cuda(Devices(accelerator=_accelerator(options))):
            return None
        local = 1
    else:
        local = int(devices)
    return local * int(options.get("num_nodes", 1))


def options_on(options: Mapping[str, Any], devices: Devices) -> dict[str, Any]:
    """Returns trainer options for other devices; what need not change stays as it is.

    Args:
        options: The user's.
        devices: Where the training is to run.

    Raises:
        ConfigurationError: Lightning has no such strategy, or not there, or the options hold another as an object.
    """
    before, found = devices_of(options, devices.threads), dict(options)
    if devices.accelerator != before.accelerator:
        found["accelerator"] = devices.accelerator
        if devices.ids is None and isinstance(found.get("devices"), list | tuple):  # indices of another accelerator's
            found["devices"] = len(found["devices"])
    if devices.precision != before.precision:
        found["precision"] = MIXED[devices.precision]
    if devices.strategy not in {before.strategy, _family(options)}:
        found["strategy"] = _other(options, devices)
    if devices.ranked:
        if (devices.strategy, devices.count, devices.ids) != (before.strategy, before.count, before.ids):
            found["num_nodes"], local = _places(devices)
            found["devices"] = list(devices.ids) if devices.ids else local
    elif devices.ids != before.ids or devices.count is not None or before.ranked:
        found |= {"num_nodes": 1, "devices": list(devices.ids) if devices.ids else 1}
    if found.get("num_nodes") == 1:
        del found["num_nodes"]
    return found


def _other(options: Mapping[str, Any], devices: Devices) -> str:
    """Returns the trainer option ``strategy`` for another strategy than the options have."""
    named = options.get("strategy", "auto")
    if devices.strategy == "dp":
        raise ConfigurationError("strategy 'dp' is not among Lightning's: use 'ddp'")
    if not isinstance(named, str):
        raise ConfigurationError(
            f"strategy {devices.strategy!r} was asked for, and the trainer options hold a {type(named).__name__}: "
            "leave one of them out"
        )
    if devices.strategy == "fsdp" and not may_use_cuda(devices):
        raise ConfigurationError("Lightning's FSDP needs CUDA devices: use strategy 'ddp', or a TorchLearner")
    return "auto" if devices.strategy == "single" else devices.strategy


def _places(devices: Devices) -> tuple[int, int]:
    """Returns how many machines ranks are on, and how many devices each of them has."""
    place = Launched.here()
    named = len(devices.ids) if devices.ids else None
    if place is not None and devices.count in {None, place.count}:
        total, local = place.count, named or place.local_count
    else:
        total = devices.count or named or 1
        local = named or total
    return max(total // local, 1), local


def _accelerator(options: Mapping[str, Any]) -> Accelerator:
    accelerator = options.get("accelerator", "auto")
    return ACCELERATORS.get(accelerator, "auto") if isinstance(accelerator, str) else "auto"


def _ids(options: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the indices that the trainer option ``devices`` names."""
    devices = options.get("devices")
    if isinstance(devices, str) and "," in devices:
        return tuple(int(index) for index in devices.split(",") if index.strip())
    return tuple(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else None


def _family(options: Mapping[str, Any]) -> Strategy:
    """Returns which strategy the options name, as it is seen from outside."""
    strategy = options.get("strategy", "auto")
    if strategy == "auto":
        return "ddp" if (device_count(options) or 1) > 1 else "single"
    if isinstance(strategy, FSDPStrategy):
        return "fsdp"
    if isinstance(strategy, DDPStrategy):
        return "ddp" if getattr(strategy, "_start_method", "popen") == "popen" else "single"
    name = strategy if isinstance(strategy, str) else ""
    if any(part in name for part in STARTING):
        return "single"
    return next((family for family in ("ddp", "fsdp") if name.startswith(family)), "single")
