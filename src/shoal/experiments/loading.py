"""Finding an experiment's function, and calling it with what the command line says."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.errors import ConfigurationError, unknown_name
from shoal.experiments.overrides import apply, converted
from shoal.federation import Experiment

BUILT_IN = ("cifar10", "digits", "fashion_mnist", "synthetic")
"""The experiments that come with shoal."""

ExperimentFunction = Callable[..., Experiment]


def load(name: str) -> ExperimentFunction:
    """Returns the function ``experiment`` of a Python file or of a built-in experiment.

    Args:
        name: A path that ends in ``.py``, or one of :data:`BUILT_IN`.

    Raises:
        ConfigurationError: There is no such file or name, or the file has no such function.
    """
    if not name.endswith(".py"):
        if name not in BUILT_IN:
            raise unknown_name("experiment", name, BUILT_IN)
        return importlib.import_module(f"shoal.experiments.{name}").experiment  # type: ignore[no-any-return]
    path = Path(name)
    if not path.is_file():
        raise ConfigurationError(f"there is no experiment file {path}; built in are {', '.join(BUILT_IN)}")
    function = getattr(_import_file(path), "experiment", None)
    if not callable(function):
        raise ConfigurationError(f"{path} has no function experiment(...) that returns a shoal.Experiment")
    return function  # type: ignore[no-any-return]


def build(function: ExperimentFunction, settings: Mapping[str, str]) -> Experiment:
    """Calls an experiment's function, and overrides what it returns.

    Args:
        function: Its parameters are the experiment's own settings.
        settings: Values by key, as text. A key is a parameter of the function, a field of the experiment
            (``rounds``), the name ``algorithm``, or a field of the algorithm or learner (``algorithm.mu``,
            ``learner.epochs``).

    Raises:
        ConfigurationError: A key does not exist, or its value cannot be read.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    own = {key: converted(key, text, parameters[key].annotation) for key, text in settings.items() if key in parameters}
    try:
        experiment = function(**own)
    except TypeError as error:
        if missing := [p.name for p in parameters.values() if p.default is p.empty and p.name not in own]:
            raise ConfigurationError(f"the experiment needs --set {missing[0]}=…") from error
        raise
    if not isinstance(experiment, Experiment):
        raise ConfigurationError(f"experiment(...) must return a shoal.Experiment, not {type(experiment).__name__}")
    # The seed decides the experiment's data and its run alike, so it may be both a parameter and a field.
    rest = {key: text for key, text in settings.items() if key not in own or key == "seed"}
    return apply(experiment, rest, also_known=parameters)


def _import_file(path: Path) -> Any:
    """Imports a file as a module under its own name, with its folder on the path, as ``python FILE`` would."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
