"""A Keras model that all clients pass through, and its arrays by the paths of its variables."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from shoal import trees
from shoal.devices import Precision
from shoal.errors import ConfigurationError
from shoal.learners.keras_backend import keras, tf
from shoal.learners.keras_cluster import WorkerGroup
from shoal.learners.keras_devices import hide_gpus
from shoal.types import ModelState, Params

POLICIES: dict[Precision, str] = {"bf16": "mixed_bfloat16", "fp16": "mixed_float16"}
"""Keras's names of the precisions in which products are computed."""


@dataclass(frozen=True)
class ModelVariables:
    """The variables of a model by path."""

    params: Mapping[str, Any]
    """The trained ones."""
    buffers: Mapping[str, Any]
    """The statistics that training gathers."""
    constants: Mapping[str, Any]
    """The frozen ones."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """Returns those of a Keras model.

        Raises:
            ConfigurationError: Two have one path.
        """
        trained = {id(variable) for variable in model.trainable_variables}
        statistics = _statistics(model)
        own = cls({}, {}, {})
        groups: dict[str, Any] = vars(own)
        for variable in model.weights:
            kind = "params" if id(variable) in trained else "buffers" if id(variable) in statistics else "constants"
            if any(variable.path in group for group in groups.values()):
                raise ConfigurationError(f"two variables of the model have the path {variable.path}: name their layers")
            groups[kind][variable.path] = variable
        return own

    def state(self) -> ModelState:
        """Returns copies of the arrays."""
        return ModelState(
            **{kind: {path: one.numpy() for path, one in group.items()} for kind, group in vars(self).items()}
        )


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
        self.workers = WorkerGroup.of(strategy)
        """The processes that share the model."""
        self.replicas = int(strategy.num_replicas_in_sync)
        """How many copies of it are kept in step, those of other processes included."""
        each = self.replicas // self.workers.count
        self.own_replicas = range(self.workers.index * each, (self.workers.index + 1) * each)
        """Which of them are this process's; all processes have as many."""
        with _numbered_anew(), strategy.scope(), _drawn_from(seed), _computing_in(precision):
            self.model = make()
            """The user's."""
            _check(self.model)
            self.model.optimizer.build(self.model.trainable_variables)
        model = self.model
        own = ModelVariables.of(model)
        self.params, self.buffers, self.constants = own.params, own.buffers, own.constants
        weights = {id(variable) for variable in model.weights}
        self._noise = [
            variable
            for variable in model.variables
            if id(variable) not in weights and variable.path.endswith("seed_generator_state")
        ]
        self._fresh = [variable.numpy() for variable in model.optimizer.variables]

    def state(self) -> ModelState:
        """Returns copies of the model's arrays."""
        return ModelVariables(self.params, self.buffers, self.constants).state()

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
        if self._scheduled:
            raise ConfigurationError(
                "scale_lr multiplies one learning rate, and the model was compiled with a schedule: scale that one"
            )
        self._optimizer.learning_rate = self.rate * factor

    def put_rate(self, rate: float) -> None:
        """Sets the learning rate, unless a schedule decides it."""
        if not self._scheduled:
            self._optimizer.learning_rate = rate

    @property
    def _scheduled(self) -> bool:
        schedules = keras.optimizers.schedules.LearningRateSchedule
        return isinstance(self._optimizer._learning_rate, schedules)  # noqa: SLF001 - the public name is a number

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
        """Lets dropout and the like draw from a seed, on each replica from one of its own."""
        for number, variable in enumerate(self._noise):
            copies = self.strategy.experimental_local_results(variable.value)
            for replica, own in zip(self.own_replicas, copies, strict=True):
                words = [seed, number, replica] if replica else [seed, number]
                drawn = np.random.SeedSequence(words).generate_state(1, np.uint32)[0]
                own.assign(np.array([drawn, 0], np.uint32))


def first_model(make: Any, seed: int) -> ModelState | None:
    """Returns a model before training, as a learner would begin with it; None where it is no Keras model.

    Args:
        make: Makes it; or the model itself.
        seed: Decides the first weights.

    Raises:
        ConfigurationError: It has no variables yet.
    """
    model = make
    if not isinstance(make, keras.Model):
        if not callable(make):
            return None
        hide_gpus()  # which the sites want
        with _numbered_anew(), _drawn_from(seed):
            model = make()
    if not isinstance(model, keras.Model):
        return None
    _check_built(model)
    return ModelVariables.of(model).state()


def _check(model: Any) -> None:
    """Refuses what cannot be trained as it is."""
    if not isinstance(model, keras.Model):
        raise ConfigurationError(f"model must be a function that makes a keras.Model, and it made {model!r}")
    if not model.compiled or model.optimizer is None:
        raise ConfigurationError("the model is not compiled: call model.compile(optimizer=…, loss=…) in the function")
    _check_built(model)
    if not model.trainable_variables:
        raise ConfigurationError("no variable of the model can be trained: all its layers are frozen")
    if type(model).train_step is not keras.Model.train_step or type(model).test_step is not keras.Model.test_step:
        raise ConfigurationError(
            f"{type(model).__name__} has a train_step or test_step of its own, which shoal's loop would not call: "
            "override compute_loss instead, or use the model in a script with shoal.client"
        )


def _check_built(model: Any) -> None:
    if not model.weights:
        raise ConfigurationError(
            "the model has no variables yet: give it a keras.Input, or call model.build(shape) in the function"
        )


def _statistics(model: Any) -> set[int]:
    """Returns the ids of the variables that training changes without gradients, such as BatchNorm's moving mean."""
    found = set()
    for layer in model._flatten_layers(include_self=True, recursive=True):  # noqa: SLF001 - there is no other way
        if layer.trainable:
            own = layer._non_trainable_variables  # noqa: SLF001 - without those of layers within it
            found |= {id(variable) for variable in own if "float" in variable.dtype}
    return found


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
