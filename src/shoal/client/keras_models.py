"""Keras models in a script's own hands: their arrays by path, and the local objective among their losses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from shoal import trees
from shoal.errors import ConfigurationError
from shoal.types import LocalObjective, ModelState, Params


def is_keras_model(model: Any) -> bool:
    """Tells whether it is one; Keras is not imported for that."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(model, keras.Model)


def arrays_of(model: Any) -> Params:
    """Returns copies of a Keras model's arrays, by the paths of its variables."""
    from shoal.learners.keras_model import ModelVariables

    return ModelVariables.of(model).state().merged()


def load_arrays(model: Any, arrays: Params) -> None:
    """Puts arrays into a Keras model.

    Raises:
        ConfigurationError: Their names or shapes are not the model's.
    """
    variables = {variable.path: variable for variable in model.weights}
    if difference := trees.mismatch(arrays, variables):
        raise ConfigurationError(
            f"the federation's model is another than this one: the tree {difference}; "
            "layers without a name are counted for the life of a process, so make this model first, or name them"
        )
    for path, variable in variables.items():
        variable.assign(arrays[path])


def put_objective(model: Any, objective: LocalObjective, start: ModelState) -> None:
    """Has the local objective among a Keras model's losses, from now until the next call.

    ``⟨correction, w⟩ + (proximal / 2)·‖w − w_global‖²`` is added as regularizers of the trained variables, which
    Keras's own ``fit`` and ``compute_loss`` count, on several replicas once.

    Args:
        model: The Keras model.
        objective: What to add; may be nothing.
        start: The global model.
    """
    own = _objectives.get(model)
    if own is None:
        if not objective.proximal and not objective.correction:
            return
        own = _objectives[model] = _Objective(model)
    own.put(objective, start)


class _Objective:
    """The terms of one model, as variables, because steps are compiled once.

    Args:
        model: The Keras model.
    """

    def __init__(self, model: Any) -> None:
        from shoal.learners.keras_backend import tf

        self._tf = tf
        self._trained = list(model.trainable_variables)
        with model.distribute_strategy.scope():
            self._proximal = tf.Variable(0.0, trainable=False)
            self._starts = [self._like(variable) for variable in self._trained]
            self._corrections = [self._like(variable) for variable in self._trained]
        for variable, start, correction in zip(self._trained, self._starts, self._corrections, strict=True):
            variable.regularizer = self._term(variable.regularizer, start, correction)
        model.train_function = model.test_function = None  # those that were compiled have no such term

    def put(self, objective: LocalObjective, start: ModelState) -> None:
        """Replaces the terms."""
        self._proximal.assign(objective.proximal)
        for variable, first, term in zip(self._trained, self._starts, self._corrections, strict=True):
            first.assign(start.params[variable.path])
            given = (objective.correction or {}).get(variable.path)
            term.assign(self._tf.zeros_like(term) if given is None else given)

    def _like(self, variable: Any) -> Any:
        return self._tf.Variable(self._tf.zeros(variable.shape, variable.dtype), trainable=False)

    def _term(self, own: Callable[[Any], Any] | None, start: Any, correction: Any) -> Callable[[Any], Any]:
        tf, proximal = self._tf, self._proximal

        def term(variable: Any) -> Any:
            value = tf.convert_to_tensor(variable)
            distance = tf.reduce_sum(tf.square(value - start))
            total = tf.cast(proximal, value.dtype) / 2 * distance + tf.reduce_sum(correction * value)
            return total if own is None else total + own(variable)

        return term


_objectives: WeakKeyDictionary[Any, _Objective] = WeakKeyDictionary()
"""Those of the models that had one."""
