"""A job as a folder: its script, the modules beside it, its first model, and its settings as JSON.

The folder is a job of NVFlare's, too, whose code is all that.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from shoal import trees
from shoal.algorithms import ALGORITHMS, Algorithm
from shoal.deploy.nvflare_job import CUSTOM, write_job
from shoal.deploy.order import Order
from shoal.devices import Devices
from shoal.errors import ConfigurationError
from shoal.federation.job import Job
from shoal.learners.script import FirstModel, ScriptLearner
from shoal.runs.checkpoints import save_model
from shoal.runs.files import is_taken, storing, write_json
from shoal.sites import Deadlines, Site

JOB, MODEL = "job.json", "model.safetensors"

FORMAT = 1
"""Counts the changes of what the folder holds."""

KEPT = ("name", "rounds", "min_sites", "deadline", "on_failure", "max_restarts", "accelerator", "share_devices", "seed")
"""The fields of a job that are JSON as they are."""

SITE_FIELDS = ("name", "config", "args", "env", "python", "command")


def is_job(path: Path) -> bool:
    """Tells whether a path is a folder that :func:`export_job` has made, or the part of it that is shoal's."""
    return own_part(path) is not None


def export_job(job: Job, folder: Path) -> None:
    """Writes all that a job needs into a new folder.

    Args:
        job: Of a script.
        folder: Must not exist, or be empty.

    Raises:
        ConfigurationError: The job cannot be written as files, or the folder has something in it.
        StorageError: The folder cannot be written.
    """
    if job.script is None:
        raise ConfigurationError(
            "a job with a learner=… holds Python objects, which are no files: export one with a script=…"
        )
    if is_taken(folder):
        raise ConfigurationError(f"{folder} is there already: export to a new folder")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.name).strip("-._") or "job"
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        own = Path(scratch) / name
        _write_own_part(job, own)
        with storing(folder):
            write_job(
                folder,
                order=Order(experiment=name, name=name).to_json(),
                name=name,
                sites=[site.name for site in job.sites],
                files={name: own},
                min_clients=job.min_sites or len(job.sites),
            )


def _write_own_part(job: Job, folder: Path) -> None:
    """Writes what shoal reads of a job."""
    settings = _settings(job)
    script = Path(job.script or "").resolve()
    learner = ScriptLearner(script, job.model)
    model = learner.init(job.seed)
    folder.mkdir(parents=True)
    for path in (script, *local_modules(script)):
        target = folder / path.relative_to(script.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    arrays = trees.flatten({"params": model.params, "buffers": model.buffers, "constants": model.constants})
    save_model(folder / MODEL, arrays, {"framework": trees.framework(model.params)})
    write_json(folder / JOB, {"format": FORMAT, "script": script.name, "ties": learner.ties(model), **settings})


def own_part(path: Path) -> Path | None:
    """Returns the folder with what shoal reads, at a path or in the job of NVFlare's that is there; None for none."""
    if (path / JOB).is_file():
        return path
    found = sorted(path.glob(f"{CUSTOM}/*/{JOB}"))
    return found[0].parent if found else None


def load_job(folder: Path) -> Job:
    """Returns the job that :func:`export_job` has written.

    Raises:
        ConfigurationError: The folder does not hold one.
    """
    folder = own_part(folder) or folder
    try:
        told: dict[str, Any] = json.loads((folder / JOB).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ConfigurationError(
                f"{folder} was exported in format {told['format']}, and this version of shoal knows {FORMAT}"
            )
        return Job(
            script=folder / told["script"],
            model=_load_model(folder / MODEL, told["ties"]),
            args=told["args"],
            algorithm=_algorithm(told["algorithm"]),
            sites=[Site(**{**site, "devices": _devices(site["devices"])}) for site in told["sites"]],
            waits=Deadlines(**told["waits"]),
            settings=told["settings"],
            **{name: told[name] for name in KEPT},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{folder} holds no job that can be read: {type(error).__name__}: {error}") from error


def local_modules(script: Path) -> list[Path]:
    """Returns the Python files beside a script that it imports, or that those import."""
    folder = script.parent
    found: dict[Path, None] = {}
    waiting = [script]
    while waiting:
        for name in _imported(waiting.pop()):
            for path in _files(folder, name):
                if path not in found and path != script:
                    found[path] = None
                    waiting.append(path)
    return list(found)


def _imported(path: Path) -> Iterator[str]:
    """Yields the names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Yields the files that importing a module reads, as far as they lie in a folder."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        base = folder.joinpath(*parts[:length])
        yield from (path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file())


def _settings(job: Job) -> dict[str, Any]:
    """Returns a job's settings as JSON."""
    told = {name: getattr(job, name) for name in KEPT}
    told["args"] = [str(word) for word in job.args]
    told["waits"] = dataclasses.asdict(job.waits)
    told["settings"] = dict(job.settings)
    told["algorithm"] = job.algorithm.describe()
    told["sites"] = [
        {**{name: getattr(site, name) for name in SITE_FIELDS}, "devices": _told_devices(site.devices)}
        for site in job.sites
    ]
    try:
        _algorithm(told["algorithm"])
        json.dumps(told, default=_listed)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigurationError(f"the job cannot be written as JSON: {error}") from error
    plain: dict[str, Any] = json.loads(json.dumps(told, default=_listed))
    return plain


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _told_devices(devices: Any) -> Any:
    return dataclasses.asdict(devices) if isinstance(devices, Devices) else devices


def _devices(told: Any) -> Any:
    return Devices(**told) if isinstance(told, dict) else told


def _algorithm(told: Mapping[str, Any]) -> Algorithm:
    name = told["name"]
    method = ALGORITHMS.get(str(name).lower())
    if method is None:
        raise ConfigurationError(f"algorithm {name!r} is none of shoal's own, and cannot be found again from its name")
    return method(**{key: value for key, value in told.items() if key != "name"})


def _load_model(path: Path, ties: Mapping[str, str]) -> FirstModel:
    with safe_open(path, framework="numpy") as file:
        framework = (file.metadata() or {}).get("framework", "numpy")
    with safe_open(path, framework="pt" if framework == "torch" else "numpy") as file:
        parts = trees.unflatten({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    return FirstModel(
        params=parts.get("params", {}),
        buffers=parts.get("buffers", {}),
        constants=parts.get("constants", {}),
        ties=dict(ties),
    )
