"""``key=value`` from the command line, put into frozen configurations with the types of their fields."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from shoal.algorithms import ALGORITHMS
from shoal.engines import ENGINES, Engine
from shoal.errors import ConfigurationError, unknown_name
from shoal.federation import Experiment
from shoal.training import Training

SCALARS = (bool, int, float, str)
PARTS = ("algorithm", "learner")

C = TypeVar("C", Experiment, Training)


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """Returns ``["rounds=3", "algorithm.mu=0.1"]`` as a mapping; of a repeated key the last counts.

    Raises:
        ConfigurationError: A pair has no ``=``.
    """
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"--set takes key=value, not {pair!r}")
        settings[key.strip()] = text.strip()
    return settings


def apply(experiment: Experiment, settings: Mapping[str, str], *, also_known: Iterable[str] = ()) -> Experiment:
    """Returns the experiment with other values in the fields that the settings name.

    Args:
        experiment: What to start from.
        settings: Values by key, as text.
        also_known: Further keys that exist elsewhere, to be named when one is misspelt.

    Raises:
        ConfigurationError: A key does not exist, or its value cannot be read.
    """
    if "algorithm" in settings:
        name = settings["algorithm"].lower()
        if name not in ALGORITHMS:
            raise unknown_name("algorithm", name, ALGORITHMS)
        experiment = dataclasses.replace(experiment, algorithm=ALGORITHMS[name]())
    of_engine = {key.removeprefix("engine."): text for key, text in settings.items() if key.startswith("engine.")}
    if of_engine:
        engine = named_engine(settings.get("engine", experiment.engine), of_engine)
        experiment = dataclasses.replace(experiment, engine=engine)
        settings = {key: text for key, text in settings.items() if key.partition(".")[0] != "engine"}
    given = {key: text for key, text in settings.items() if key != "algorithm"}
    return _with_values(experiment, PARTS, given, also_known=("algorithm", *also_known))


def apply_to_training(training: Training, settings: Mapping[str, str], *, also_known: Iterable[str] = ()) -> Training:
    """Returns the training with other values in the fields that the settings name; as :func:`apply` does.

    Raises:
        ConfigurationError: A key does not exist, or its value cannot be read.
    """
    return _with_values(training, ("learner",), settings, also_known=also_known)


def _with_values(config: C, parts: Sequence[str], settings: Mapping[str, str], *, also_known: Iterable[str]) -> C:
    """Returns a configuration with other values in its fields and in those of its parts.

    Args:
        config: A dataclass.
        parts: Which of its fields are dataclasses whose own fields may be named, with a dot.
        settings: Values by key, as text.
        also_known: Further keys that exist elsewhere.
    """
    known: dict[str, Any] = _fields(config)
    for part in parts:
        known |= {f"{part}.{field}": hint for field, hint in _fields(getattr(config, part)).items()}
    for key in settings:
        if key not in known:
            raise unknown_name("setting", key, [*known, *also_known])
    values = {key: converted(key, text, known[key]) for key, text in settings.items()}
    for part in parts:
        inner = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{part}.")}
        if inner:
            config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **inner)})
    return dataclasses.replace(config, **{key: value for key, value in values.items() if "." not in key})


def named_engine(name: str | Engine, settings: Mapping[str, str]) -> Engine:
    """Returns an engine with other values in the parameters that the settings name.

    Args:
        name: One of :data:`~shoal.engines.ENGINES`.
        settings: Values by parameter, as text; at least one.

    Raises:
        ConfigurationError: The engine is not named, it has no such parameter, or a value cannot be read.
    """
    asked = f"engine.{next(iter(settings))}"
    if name == "auto":
        raise ConfigurationError(
            f"{asked} belongs to one engine, and auto chooses among several: name it with --engine"
        )
    if not isinstance(name, str):
        raise ConfigurationError(
            f"{asked} was given, but the experiment makes its engine itself: name one with --engine"
        )
    if name not in ENGINES:
        raise unknown_name("engine", name, ["auto", *ENGINES])
    parameters = inspect.signature(ENGINES[name], eval_str=True).parameters
    for key in settings:
        if not parameters:
            raise ConfigurationError(f"engine.{key} was given, but engine {name} has no settings")
        if key not in parameters:
            raise unknown_name(f"setting of engine {name}", key, parameters)
    values = {key: converted(f"engine.{key}", text, parameters[key].annotation) for key, text in settings.items()}
    return ENGINES[name](**values)


def converted(key: str, text: str, hint: Any) -> Any:
    """Returns ``text`` as a value of the annotated type.

    Raises:
        ConfigurationError: It is no such value.
    """
    kinds = _alternatives(hint)
    if text.lower() in ("none", "null") and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str:
            return text
    names = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ConfigurationError(f"{key} takes {names}, not {text!r}")


def _fields(config: Any) -> dict[str, Any]:
    """Returns the types of a dataclass's fields that can be written as text."""
    if not dataclasses.is_dataclass(config):
        return {}
    hints = typing.get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config) if field.init]
    return {name: hints[name] for name in names if set(_alternatives(hints[name])) & set(SCALARS)}


def _alternatives(hint: Any) -> tuple[type, ...]:
    """Returns the scalar types that an annotation admits, None among them, in the order in which to try them."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [kind for option in typing.get_args(hint) for kind in _alternatives(option)]
        return tuple(sorted(inner, key=[type(None), *SCALARS].index))
    if typing.get_origin(hint) is Literal:
        return (str,)
    return (hint,) if hint in (*SCALARS, type(None)) else ()
