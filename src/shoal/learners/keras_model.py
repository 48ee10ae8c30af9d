"""A Keras model that all clients pass through, and its arrays by the paths of its variables."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from shoal import trees
from shoal.devices import Precision
from shoal.errors import ConfigurationError
from shoal.learners.keras_backend import keras, tf
from shoal.types import ModelState, Params

POLICIES: dict[Precision, str] = {"bf16": "mixed_bfloat16", "fp16": "mixed_float16"}
"""Keras's names of the precisions in which products are computed."""


class ResidentModel:
    """A compiled model on its devices.

    Args:
        make: Makes it, with the random numbers that the seed gives.
        strategy: TensorFlow's, of the devices.
        precision: Of products.
        seed: Decides the first weights.

    Raises:
        ConfigurationError: It is no model that can be trained.
    """

    def __init__(self, make: Callable[[], Any], strategy: Any, precision: Precision, seed: int) -> None:
        self.strategy = strategy
        """TensorFlow's."""
        with _numbered_anew(), strategy.scope(), _drawn_from(seed), _computing_in(precision):
            self.model = make()
            """The user's."""
            _check(self.model)
            self.model.optimizer.build(self.model.trainable_variables)
        model = self.model
        trained = {id(variable) for variable in model.trainable_variables}
        statistics = _statistics(model)
        groups: dict[str, dict[str, Any]] = {"params": {}, "buffers": {}, "constants": {}}
        for variable in model.weights:
            kind = "params" if id(variable) in trained else "buffers" if id(variable) in statistics else "constants"
            if any(variable.path in group for group in groups.values()):
                raise ConfigurationError(f"two variables of the model have the path {variable.path}: name their layers")
            groups[kind][variable.path] = variable
        self.params: Mapping[str, Any] = groups["params"]
        """The trained variables by path."""
        self.buffers: Mapping[str, Any] = groups["buffers"]
        """The statistics that training gathers."""
        self.constants: Mapping[str, Any] = groups["constants"]
        """The frozen variables."""
        weights = {id(variable) for variable in model.weights}
        self._noise = [
            variable
            for variable in model.variables
            if id(variable) not in weights and variable.path.endswith("seed_generator_state")
        ]
        self._fresh = [variable.numpy() for variable in model.optimizer.variables]

    def state(self) -> ModelState:
        """Returns copies of the model's arrays."""
        return ModelState(params=_arrays(self.params), buffers=_arrays(self.buffers), constants=_arrays(self.constants))

    def load(self, model: ModelState) -> None:
        """Puts arrays into the model.

        Raises:
            ConfigurationError: Their names or shapes are not the model's.
        """
        for variables, arrays in ((self.params, model.params), (self.buffers, model.buffers)):
            if difference := trees.mismatch(arrays, variables):
                raise ConfigurationError(f"the arrays to load are not this model's: the tree {difference}")
            for path, variable in variables.items():
                variable.assign(arrays[path])
        for path, array in model.constants.items():
            self.constants[path].assign(array)

    def delta(self, before: ModelState) -> tuple[Params, Params]:
        """Returns what training changed in the parameters and in the buffers, in float64."""
        after = self.state()
        return trees.difference(after.params, before.params), trees.difference(after.buffers, before.buffers)

    def reset_optimizer(self) -> None:
        """Lets the optimizer begin anew."""
        for variable, first in zip(self.model.optimizer.variables, self._fresh, strict=True):
            variable.assign(first)

    @property
    def accelerator(self) -> str:
        """The kind of device that it is on, as torch calls it."""
        return "cuda" if any("GPU" in device for device in self.strategy.extended.worker_devices) else "cpu"

    @property
    def rate(self) -> float:
        """The optimizer's learning rate, as of its last step."""
        return float(tf.convert_to_tensor(self._optimizer.learning_rate))

    def scale_rate(self, factor: float) -> None:
        """Multiplies the learning rate.

        Raises:
            ConfigurationError: A schedule decides it.
        """
        schedules = keras.optimizers.schedules.LearningRateSchedule
        if isinstance(self._optimizer._learning_rate, schedules):  # noqa: SLF001 - the public name is a number
            raise ConfigurationError(
                "scale_lr multiplies one learning rate, and the model was compiled with a schedule: scale that one"
            )
        self._optimizer.learning_rate = self.rate * factor

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """Returns copies of the optimizer's variables, by their places."""
        return {str(place): variable.numpy() for place, variable in enumerate(self.model.optimizer.variables)}

    def load_optimizer(self, arrays: Params) -> None:
        """Undoes :meth:`optimizer_state`.

        Raises:
            ConfigurationError: They are another optimizer's.
        """
        variables = self.model.optimizer.variables
        if difference := trees.mismatch(arrays, {str(place): one for place, one in enumerate(variables)}):
            raise ConfigurationError(f"the optimizer's state is not that of this optimizer: the tree {difference}")
        for place, variable in enumerate(variables):
            variable.assign(arrays[str(place)])

    @property
    def _optimizer(self) -> Any:
        """The one that has the learning rate, within what scales the loss of fp16."""
        return getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)

    def reseed(self, seed: int) -> None:
        """Lets dropout and the like draw from a seed."""
        for number, variable in enumerate(self._noise):
            drawn = np.random.SeedSequence([seed, number]).generate_state(1, np.uint32)[0]
            variable.assign(np.array([drawn, 0], np.uint32))


def _check(model: Any) -> None:
    """Refuses what cannot be trained as it is."""
    if not isinstance(model, keras.Model):
        raise ConfigurationError(f"model must be a function that makes a keras.Model, and it made {model!r}")
    if not model.compiled or model.optimizer is None:
        raise ConfigurationError("the model is not compiled: call model.compile(optimizer=…, loss=…) in the function")
    if not model.weights:
        raise ConfigurationError(
            "the model has no variables yet: give it a keras.Input, or call model.build(shape) in the function"
        )
    if not model.trainable_variables:
        raise ConfigurationError("no variable of the model can be trained: all its layers are frozen")
    if type(model).train_step is not keras.Model.train_step or type(model).test_step is not keras.Model.test_step:
        raise ConfigurationError(
            f"{type(model).__name__} has a train_step or test_step of its own, which shoal's loop would not call: "
            "override compute_loss instead, or use the model in a script with shoal.client"
        )


def _statistics(model: Any) -> set[int]:
    """Returns the ids of the variables that training changes without gradients, such as BatchNorm's moving mean."""
    found = set()
    for layer in model._flatten_layers(include_self=True, recursive=True):  # noqa: SLF001 - there is no other way
        if layer.trainable:
            own = layer._non_trainable_variables  # noqa: SLF001 - without those of layers within it
            found |= {id(variable) for variable in own if "float" in variable.dtype}
    return found


def _arrays(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {path: variable.numpy() for path, variable in variables.items()}


@contextmanager
def _numbered_anew() -> Iterator[None]:
    """Has Keras number layers without a name as in a new process, so that a model's paths are the same each time."""
    policy = keras.config.dtype_policy()
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy(policy)
    yield


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Has Keras draw from a seed; Python's generator, from which it takes the seeds, is as it was afterwards."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _computing_in(precision: Precision) -> Iterator[None]:
    if precision == "fp32":  # as the user's own policy says
        yield
        return
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(POLICIES[precision])
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)


def replicas(strategy: Any) -> int:
    """Returns how many copies of the model a strategy keeps in step."""
    return int(strategy.num_replicas_in_sync)
