"""What a site allows, as its administrator writes it: ``site.toml``."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from shoal.deploy.request import NAME
from shoal.errors import ConfigurationError, unknown_name

SETTINGS = "site.toml"
"""The file in a site's folder."""

JOB = "job.json"
"""The file that the folder of an exported job has."""

LARGEST = 10**9
"""The largest limit: as seconds, what the system can wait."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a site does at most for one run."""

    rounds: int = 10_000
    """Rounds."""
    seconds: float = 3600.0
    """For one task."""
    megabytes: float = 4096.0
    """Of the arrays that it takes, or sends, in one task."""
    idle: float = 900.0
    """Seconds without a request after which a run's processes are ended, to start again at its next one, and another
    run may have the site."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) not in (int, float) or not 0 < value <= LARGEST:
                raise ConfigurationError(f"limits.{name} must be a number > 0 and ≤ {LARGEST:,}, not {value!r:.40}")


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """An experiment that a site runs when a server asks for it by name."""

    name: str
    """What servers call it."""
    source: str
    """What it is here: a built-in experiment, a Python file, or the folder of an exported job."""
    settings: Sequence[str] = ()
    """Which settings the server may choose; ``"*"`` for all."""
    devices: Any = None
    """The site's devices for it: how many, or the indices of its CUDA devices; None as the experiment says."""
    accelerator: str = "auto"
    """``cpu``, ``cuda``, or ``auto``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The site's own settings, over those of the experiment's site."""
    same_version: bool = True
    """Whether the learner, or the script, must be the same as the server's."""

    def refusal(self, settings: Mapping[str, str]) -> str | None:
        """Says which of a server's settings may not be chosen; None if all may."""
        if "*" in self.settings:
            return None
        wrong = sorted(settings.keys() - set(self.settings))
        if not wrong:
            return None
        return (
            f"this site does not let a server set {', '.join(wrong[:3])} of {self.name}: "
            f'leave it out, or allow it here with settings = ["{wrong[0]}"]'
        )


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """What a site is called, allows and limits."""

    name: str
    """As the server's experiment calls it."""
    allowed: Mapping[str, Allowed]
    """The experiments by name."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"a site's name has letters, digits, dots, dashes and underscores, and is not {self.name!r}"
            )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Returns the settings of the site whose folder this is.

        Raises:
            ConfigurationError: The file is missing, is no TOML, or says what is not known.
        """
        path = folder / SETTINGS
        try:
            told = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(
                f"a site's folder has a file {SETTINGS}, and {path} cannot be read ({error.strerror}): "
                'write one with name = "site-1" and [experiments.digits]'
            ) from error
        except ValueError as error:
            raise ConfigurationError(f"{path} is no TOML: {error}") from error
        _refuse_unknown(told, ("name", "limits", "experiments"), str(path))
        if "name" not in told:
            raise ConfigurationError(f'{path} has no name: add name = "site-1", as the server\'s experiment calls it')
        limits = _table(told.get("limits", {}), f"[limits] of {path}")
        _refuse_unknown(limits, tuple(item.name for item in dataclasses.fields(Limits)), f"[limits] of {path}")
        experiments = _table(told.get("experiments", {}), f"[experiments] of {path}")
        if not experiments:
            raise ConfigurationError(f"{path} allows no experiment: add [experiments.NAME] for each that may run here")
        return cls(
            name=str(told["name"]),
            allowed={name: _allowed(name, table, path) for name, table in experiments.items()},
            limits=Limits(**limits),
        )


def _allowed(name: str, table: Any, path: Path) -> Allowed:
    if not isinstance(table, dict) or not NAME.fullmatch(name):
        raise ConfigurationError(f"[experiments.{name}] of {path} must be a table under a plain name")
    known = [item.name for item in dataclasses.fields(Allowed) if item.name != "name"]
    _refuse_unknown(table, known, f"[experiments.{name}] of {path}")
    settings = table.get("settings", [])
    if isinstance(settings, str):
        settings = [settings]
    source = table.get("source", name)
    _check(table | {"settings": settings, "source": source}, f"[experiments.{name}] of {path}")
    beside = path.parent / source
    if source.endswith(".py") or "/" in source or (beside / JOB).is_file():  # a path is meant from where the file is
        source = str(beside.resolve())
    return Allowed(**{**table, "name": name, "source": source, "settings": tuple(settings)})


def _check(table: Mapping[str, Any], where: str) -> None:
    """Refuses values of a kind that they cannot have."""
    wanted: dict[str, tuple[str, Callable[[Any], object]]] = {
        "source": ("a text", lambda value: isinstance(value, str) and value),
        "settings": ("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value))),
        "devices": ("a number ≥ 1, or a list of devices", _is_devices),
        "accelerator": ("auto, cpu or cuda", lambda value: value in ("auto", "cpu", "cuda")),
        "config": ("a table", lambda value: isinstance(value, dict)),
        "same_version": ("true or false", lambda value: isinstance(value, bool)),
    }
    for key, value in table.items():
        kind, good = wanted[key]
        if not good(value):
            raise ConfigurationError(f"{key} in {where} must be {kind}, not {value!r:.60}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_devices(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(each) is int and each >= 0 for each in value)
    return type(value) is int and value >= 1


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where} must be a table, not {value!r:.60}")
    return value


def _refuse_unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(table) - set(known)):
        raise unknown_name(f"key of {where}", unknown[0], known)


def settings_text(name: str, allowed: Sequence[Allowed], limits: Limits | None = None) -> str:
    """Returns the text of a ``site.toml``."""
    lines = [f"name = {_toml(name)}", ""]
    if limits is not None:
        lines += ["[limits]", *(f"{key} = {_toml(value)}" for key, value in vars(limits).items()), ""]
    for entry in allowed:
        lines.append(f"[experiments.{_toml(entry.name)}]")
        for key, value in vars(entry).items():
            if key != "name" and value is not None:
                lines.append(f"{key} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(str(key))} = {_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    # A text is in TOML what it is in JSON, but for one character more that must be escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
