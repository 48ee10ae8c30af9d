"""The steps of a Keras model's training and evaluation, on one replica or on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from shoal.learners.keras_backend import keras, tf
from shoal.learners.keras_model import ResidentModel, as_tensors, per_replica, replicas
from shoal.types import Broadcast

Part = tuple[np.ndarray, np.ndarray]
"""One replica's inputs and targets."""

Terms = tuple[Any, Any, Any]
"""The local objective as tensors: μ, the broadcast's parameters, and the correction; None for what it has not."""

NONE: Terms = (None, None, None)


class Steps:
    """Takes steps with the model's own compiled optimizer, loss and metrics.

    A step's gradient is the mean over the examples of all replicas, also where these do not divide: Keras takes the
    mean of the replicas' means, so each replica's loss is multiplied by its share.

    Args:
        resident: The model on its devices.
    """

    def __init__(self, resident: ResidentModel) -> None:
        self._resident = resident
        self._model = resident.model
        self._strategy = resident.strategy
        self._replicas = replicas(resident.strategy)
        self._prepared = False
        with self._strategy.scope():
            self._loss = keras.metrics.Mean(name="loss")
        self._terms = NONE

    def begin(self, broadcast: Broadcast | None = None) -> None:
        """Starts sums and means anew.

        Args:
            broadcast: Has the local objective of the steps that follow; None for none.
        """
        self.forget()
        self._terms = NONE if broadcast is None else self._terms_of(broadcast)

    def forget(self) -> None:
        """Starts sums and means anew, under the same objective."""
        self._model.reset_metrics()
        self._loss.reset_state()

    def train(self, parts: Sequence[Part], counts: Sequence[int]) -> None:
        """Makes one step.

        Args:
            parts: Each replica's inputs and targets.
            counts: How many examples of each count; a replica that has none computes one that does not.
        """
        shares = [self._replicas * count / sum(counts) for count in counts]
        with self._strategy.scope():
            batch = self._spread(parts, counts)
            self._train_function(*batch, per_replica(self._strategy, as_tensors(shares)), self._terms)

    def evaluate(self, parts: Sequence[Part], counts: Sequence[int]) -> None:
        """Measures one batch, divided likewise."""
        with self._strategy.scope():
            self._test_function(*self._spread(parts, counts))

    def means(self) -> dict[str, float]:
        """Returns the loss and the compiled metrics, over all examples since they were started."""
        found = self._model.get_metrics_result() | {"loss": self._loss.result()}
        return {name: float(value) for name, value in found.items()}

    def _spread(self, parts: Sequence[Part], counts: Sequence[int]) -> list[Any]:
        """Returns inputs, targets and numbers of examples as the replicas take them."""
        if not self._prepared:  # no variable of the metrics can be made within a step
            self._model._symbolic_build(data_batch=parts[0])  # noqa: SLF001 - as its own fit does
            self._prepared = True
        columns: list[list[Any]] = [[part[0] for part in parts], [part[1] for part in parts], list(map(float, counts))]
        return [per_replica(self._strategy, as_tensors(column)) for column in columns]

    @cached_property
    def _train_function(self) -> Callable[..., None]:
        return self._compiled(self._train_step)

    @cached_property
    def _test_function(self) -> Callable[..., None]:
        return self._compiled(self._test_step)

    def _compiled(self, step: Callable[..., None]) -> Callable[..., None]:
        """Returns a function that runs a step on all replicas."""
        model, strategy = self._model, self._strategy
        if model.run_eagerly:
            return lambda *values: strategy.run(step, args=values)
        inner = tf.function(step, jit_compile=True, reduce_retracing=True) if model.jit_compile else step
        compiled: Callable[..., None] = tf.function(
            lambda *values: strategy.run(inner, args=values), reduce_retracing=True, autograph=False
        )
        return compiled

    def _train_step(self, inputs: Any, targets: Any, counted: Any, share: Any, terms: Terms) -> None:
        model, optimizer = self._model, self._model.optimizer
        variables = model.trainable_variables
        with tf.GradientTape() as tape:
            outputs = self._outputs(inputs, training=True)
            loss = model.compute_loss(x=inputs, y=targets, y_pred=outputs, training=True)
            objective = tf.cast(loss, tf.float32) * share
            objective += self._term(variables, terms) / self._replicas
            scaled = optimizer.scale_loss(objective)
        gradients = tape.gradient(scaled, variables)
        optimizer.apply(self._clipped(gradients), variables)
        self._count(inputs, targets, outputs, loss, counted)

    def _test_step(self, inputs: Any, targets: Any, counted: Any) -> None:
        outputs = self._outputs(inputs, training=False)
        loss = self._model.compute_loss(x=inputs, y=targets, y_pred=outputs, training=False)
        self._count(inputs, targets, outputs, loss, counted)

    def _outputs(self, inputs: Any, *, training: bool) -> Any:
        takes = self._model._call_has_training_arg  # noqa: SLF001 - as its own fit does
        return self._model(inputs, training=training) if takes else self._model(inputs)

    def _count(self, inputs: Any, targets: Any, outputs: Any, loss: Any, counted: Any) -> None:
        """Takes a batch into the means; Keras has divided its loss by the number of replicas."""
        self._loss.update_state(tf.cast(loss, tf.float32) * self._replicas, sample_weight=counted)

        def measure() -> Any:
            self._model.compute_metrics(inputs, targets, outputs, None)
            return tf.constant(0)

        if self._replicas == 1:
            measure()
        else:
            tf.cond(counted > 0, measure, lambda: tf.constant(0))

    def _terms_of(self, broadcast: Broadcast) -> Terms:
        """Returns the local objective as tensors, in the order of the trained variables."""
        objective, paths = broadcast.objective, list(self._resident.params)
        proximal = tf.constant(objective.proximal, tf.float32) if objective.proximal else None
        start = [tf.constant(broadcast.model.params[path]) for path in paths] if objective.proximal else None
        correction = objective.correction and [tf.constant(objective.correction[path]) for path in paths]
        return proximal, start, correction

    @staticmethod
    def _term(variables: Sequence[Any], terms: Terms) -> Any:
        """``⟨correction, w⟩ + (proximal / 2)·‖w − w_global‖²``."""
        proximal, start, correction = terms
        total = tf.constant(0.0)
        values = [tf.convert_to_tensor(variable) for variable in variables]
        if proximal is not None:
            distances = [tf.reduce_sum(tf.square(value - first)) for value, first in zip(values, start, strict=True)]
            total += proximal / 2 * tf.add_n([tf.cast(distance, tf.float32) for distance in distances])
        if correction is not None:
            products = [tf.reduce_sum(tf.cast(c, v.dtype) * v) for v, c in zip(values, correction, strict=True)]
            total += tf.add_n([tf.cast(product, tf.float32) for product in products])
        return total

    def _clipped(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """Returns gradients that Keras may clip, which would else do so on each replica by itself, before their sum.

        Summed over the replicas and clipped, divided by their number again: below the limit, so that Keras leaves them.
        """
        optimizer = self._model.optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        limits = (inner.clipnorm, inner.clipvalue, inner.global_clipnorm)
        if self._replicas == 1 or not any(limits):
            return gradients
        scale = tf.cast(getattr(optimizer, "dynamic_scale", 1.0), tf.float32)
        context = tf.distribute.get_replica_context()
        sums = [None if each is None else each / scale for each in context.all_reduce("sum", list(gradients))]
        if inner.clipnorm:
            sums = [None if each is None else tf.clip_by_norm(each, inner.clipnorm) for each in sums]
        elif inner.global_clipnorm:
            sums, _ = tf.clip_by_global_norm(sums, inner.global_clipnorm)
        else:
            limit = inner.clipvalue
            sums = [None if each is None else tf.clip_by_value(each, -limit, limit) for each in sums]
        return [None if each is None else each * scale / self._replicas for each in sums]
