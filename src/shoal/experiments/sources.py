"""What an experiment is to others: the name that sites allow it under, its files, and its sites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shoal.errors import ConfigurationError
from shoal.experiments.loading import BUILT_IN
from shoal.federation.job_files import local_modules, own_part


def allowed_name(source: str) -> str:
    """Returns the name under which sites allow an experiment, unless told otherwise: its file's or folder's own."""
    return source if source in BUILT_IN else Path(source).resolve().name.removesuffix(".py")


def absolute(source: str) -> str:
    """Returns an experiment's source so that another process on this machine finds it, wherever it starts."""
    return source if source in BUILT_IN else str(Path(source).resolve())


def files_of(source: str) -> Mapping[str, Path]:
    """Returns an experiment's files by where they lie in a folder that is to have them all; none of a built-in one.

    Raises:
        ConfigurationError: There is no such experiment.
    """
    if source in BUILT_IN:
        return {}
    path = Path(source)
    if (own := own_part(path)) is not None:
        return {f"{path.resolve().name}/{each.relative_to(own)}": each for each in own.rglob("*") if each.is_file()}
    if not path.is_file():
        raise ConfigurationError(
            f"there is no experiment {source}: name a Python file, an exported job's folder, or {', '.join(BUILT_IN)}"
        )
    beside = {str(each.resolve().relative_to(path.resolve().parent)): each for each in local_modules(path.resolve())}
    return {path.name: path, **beside}
