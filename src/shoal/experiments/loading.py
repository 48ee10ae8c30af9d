"""Finding an experiment's function, and calling it with what the command line says."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.errors import ConfigurationError, unknown_name
from shoal.experiments.central import centrally
from shoal.experiments.overrides import apply, apply_to_training, converted
from shoal.federation import Experiment, Job
from shoal.federation.job_files import is_job, load_job
from shoal.training import Training

BUILT_IN = ("cifar10", "digits", "fashion_mnist", "payload", "synthetic")
"""The experiments that come with shoal."""

ExperimentFunction = Callable[..., Experiment]
TrainingFunction = Callable[..., Training]


def load(name: str) -> ExperimentFunction:
    """Returns the function ``experiment`` of a Python file or of a built-in experiment.

    Args:
        name: A path that ends in ``.py``, or one of :data:`BUILT_IN`, or the folder of a job that was exported.

    Raises:
        ConfigurationError: There is no such file or name, or the file has no such function.
    """
    if is_job(Path(name)):
        return load_job(Path(name)).experiment
    function = getattr(_module(name), "experiment", None)
    if not callable(function):
        raise ConfigurationError(f"{name} has no function experiment(...) that returns a shoal.Experiment")
    return function  # type: ignore[no-any-return]


def with_site(function: ExperimentFunction, site: str) -> ExperimentFunction:
    """Returns an experiment's function that is told at which site it is called, if it has a parameter ``site``."""
    if "site" in inspect.signature(function).parameters:
        return functools.partial(function, site=site)
    return function


def load_training(name: str) -> TrainingFunction | ExperimentFunction:
    """Returns the function ``training`` of a Python file, else its or a built-in experiment's function ``experiment``.

    Args:
        name: A path that ends in ``.py``, or one of :data:`BUILT_IN`.

    Raises:
        ConfigurationError: There is no such file or name, or the file has neither function.
    """
    module = _module(name)
    function = getattr(module, "training", None) or getattr(module, "experiment", None)
    if not callable(function):
        raise ConfigurationError(f"{name} has no function training(...) that returns a shoal.Training")
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
    made, rest, parameters = _made(function, settings)
    made = made.experiment() if isinstance(made, Job) else made
    if not isinstance(made, Experiment):
        raise ConfigurationError(f"experiment(...) must return a shoal.Experiment, not {type(made).__name__}")
    return apply(made, rest, also_known=parameters)


def build_training(
    function: TrainingFunction | ExperimentFunction, settings: Mapping[str, str], *, epochs: int | None = None
) -> Training:
    """Calls a function that makes a training, and overrides what it returns.

    Of an experiment it takes the learner, the data of all clients, and what the global model is measured on.

    Args:
        function: Its parameters are settings of its own.
        settings: Values by key, as text. A key is a parameter of the function, a field of the training
            (``evaluate_every``), or one of the learner (``learner.batch_size``).
        epochs: Passes over the data; None leaves them as they are. The epochs of an experiment are its clients' own.

    Raises:
        ConfigurationError: A key does not exist, or its value cannot be read.
    """
    own_epochs = function.__name__ == "training" and "epochs" in inspect.signature(function).parameters
    if epochs is not None and own_epochs:  # it may make a schedule of them
        settings = {**settings, "epochs": str(epochs)}
    made, rest, parameters = _made(function, settings)
    if isinstance(made, Experiment):
        made = centrally(made, epochs=epochs)
    if not isinstance(made, Training):
        raise ConfigurationError(f"training(...) must return a shoal.Training, not {type(made).__name__}")
    if epochs is not None:
        made = dataclasses.replace(made, epochs=epochs)
    return apply_to_training(made, rest, also_known=parameters)


def _made(
    function: Callable[..., Any], settings: Mapping[str, str]
) -> tuple[Any, dict[str, str], Mapping[str, inspect.Parameter]]:
    """Returns what a function makes of its own settings, the other settings, and its parameters."""
    parameters = inspect.signature(function, eval_str=True).parameters
    own = {key: converted(key, text, parameters[key].annotation) for key, text in settings.items() if key in parameters}
    try:
        made = function(**own)
    except TypeError as error:
        if missing := [p.name for p in parameters.values() if p.default is p.empty and p.name not in own]:
            raise ConfigurationError(f"the experiment needs --set {missing[0]}=…") from error
        raise
    # The seed decides the experiment's data and its run alike, so it may be both a parameter and a field.
    return made, {key: text for key, text in settings.items() if key not in own or key == "seed"}, parameters


def _module(name: str) -> Any:
    """Returns the module of a Python file or of a built-in experiment."""
    if not name.endswith(".py"):
        if name not in BUILT_IN:
            raise unknown_name("experiment", name, BUILT_IN)
        return importlib.import_module(f"shoal.experiments.{name}")
    path = Path(name)
    if not path.is_file():
        raise ConfigurationError(f"there is no experiment file {path}; built in are {', '.join(BUILT_IN)}")
    return _import_file(path)


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
