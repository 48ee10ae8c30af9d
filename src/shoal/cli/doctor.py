"""``shoal doctor``: what this machine has."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.version import __version__

EXTRAS = {
    "scikit-learn": "demo",
    "plotly": "tracking",
    "tensorboardX": "tracking",
    "mlflow-skinny": "mlflow",
    "wandb": "wandb",
    "lightning": "lightning",
    "tensorflow-cpu": "tensorflow",
    "flwr": "flower",
    "nvflare": "nvflare",
}
"""Optional packages, and the extra that brings each."""

OTHER_NAMES = {"tensorflow-cpu": ("tensorflow",)}
"""Packages that do as well."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show Python, torch, GPUs, communication back ends, free memory and optional packages."""
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_tables(found)


def examine() -> dict[str, Any]:
    """Returns what this machine has, as JSON; memory in bytes."""
    return {
        "shoal": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": _memory(),
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "torch": _torch(),
        "extras": {package: _extra(package, extra) for package, extra in EXTRAS.items()},
    }


def _memory() -> dict[str, int]:
    rows = (line.split() for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    kilobytes = {row[0].rstrip(":"): int(row[1]) for row in rows}
    return {"total": kilobytes["MemTotal"] * 1024, "available": kilobytes["MemAvailable"] * 1024}


def _torch() -> dict[str, Any]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "memory": total, "available": free})
    distributed = torch.distributed.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "gloo": distributed and torch.distributed.is_gloo_available(),
        "nccl": distributed and torch.distributed.is_nccl_available(),
        "threads": torch.get_num_threads(),
    }


def _extra(package: str, extra: str) -> dict[str, str | None]:
    for name in (package, *OTHER_NAMES.get(package, ())):
        try:
            return {"version": importlib.metadata.version(name), "install": None}
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"version": None, "install": f"pip install 'shoal[{extra}]'"}


def _print_tables(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    torch = found["torch"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("shoal", found["shoal"])
    table.add_row("Python", f"{found['python']} on {found['platform']}")
    table.add_row("CPUs", str(found["cpus"]))
    table.add_row("memory", f"{_gb(found['memory']['available'])} free of {_gb(found['memory']['total'])}")
    table.add_row("disk here", f"{_gb(found['disk_free'])} free")
    table.add_row("torch", f"{torch['version']}, CUDA {torch['cuda'] or 'none'}, {torch['threads']} threads")
    for gpu in torch["gpus"]:
        table.add_row("GPU", f"{gpu['name']}: {_gb(gpu['available'])} free of {_gb(gpu['memory'])}")
    if not torch["gpus"]:
        table.add_row("GPU", "none that torch can use")
    table.add_row("back ends", ", ".join(f"{name} {'yes' if torch[name] else 'no'}" for name in ("gloo", "nccl")))
    for package, state in found["extras"].items():
        table.add_row(package, state["version"] or f"not installed: {state['install']}")
    Console().print(table, markup=False, highlight=False, soft_wrap=True)


def _gb(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
