"""The steps of a Keras model's training and evaluation, on one replica or on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from shoal.learners.keras_backend import keras, tf
from shoal.learners.keras_cluster import explained
from shoal.learners.keras_model import ResidentModel
from shoal.types import Broadcast

Part = tuple[np.ndarray, np.ndarray]
"""One replica's inputs and targets."""

Terms = dict[str, Any]
"""The local objective as tensors: ``proximal`` and ``start``, ``correction``, or nothing."""


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
        self._replicas = resident.replicas
        self._own = resident.own_replicas
        self._prepared = False
        with self._strategy.scope():
            self._loss = keras.metrics.Mean(name="loss")
        self._terms: Terms = {}
        self._functions: dict[tuple[str, ...], Callable[..., None]] = {}

    def begin(self, broadcast: Broadcast | None = None) -> None:
        """Starts sums and means anew.

        Args:
            broadcast: Has the local objective of the steps that follow; None for none.
        """
        self.forget()
        self._terms = {} if broadcast is None else self._terms_of(broadcast)

    def forget(self) -> None:
        """Starts sums and means anew, under the same objective."""
        if len(self._own) == self._replicas or not self._prepared:
            self._reset()
        else:
            self._reset_function()

    def train(self, parts: Sequence[Part], counts: Sequence[int]) -> None:
        """Makes one step.

        Args:
            parts: The inputs and targets of each replica of this process.
            counts: How many examples count, of each replica of all processes; a replica that has none computes one that
                does not.

        Raises:
            WorkerError: Another process is gone.
        """
        shares = [self._replicas * count / sum(counts) for count in counts]
        self._run(self._train_step, self._columns(parts, counts, shares), self._terms)

    def evaluate(self, parts: Sequence[Part], counts: Sequence[int]) -> None:
        """Measures one batch, divided likewise."""
        self._run(self._test_step, self._columns(parts, counts), {})

    def outputs(self, inputs: np.ndarray) -> np.ndarray:
        """Returns what the model makes of inputs, on the first replica."""
        found: np.ndarray = self._predict_function(tf.convert_to_tensor(inputs)).numpy()
        return found

    def means(self) -> dict[str, float]:
        """Returns the loss and the compiled metrics, over all examples of all processes since they were started.

        Raises:
            WorkerError: Another process is gone.
        """
        with explained():
            found = self._model.get_metrics_result() | {"loss": self._loss.result()}
            return {name: float(value) for name, value in found.items()}

    def _columns(self, parts: Sequence[Part], *numbers: Sequence[float]) -> list[list[Any]]:
        """Returns the inputs, the targets and some numbers as tensors, each of them by replica of this process."""
        if not self._prepared:  # no variable of the metrics can be made within a step
            with self._strategy.scope():
                self._model._symbolic_build(data_batch=parts[0])  # noqa: SLF001 - as its own fit does
            self._prepared = True
        batches = [[tf.convert_to_tensor(part[place]) for part in parts] for place in (0, 1)]
        own = [column[self._own.start : self._own.stop] for column in numbers]
        return batches + [[tf.constant(number, tf.float32) for number in column] for column in own]

    def _run(self, step: Callable[..., None], columns: list[list[Any]], terms: Terms) -> None:
        """Runs a step on all replicas."""
        key = (step.__name__, *sorted(terms))
        with explained(), self._strategy.scope():
            if key not in self._functions:
                self._functions[key] = self._compiled(step, columns, terms)
            self._functions[key](columns, terms)

    @cached_property
    def _predict_function(self) -> Callable[[Any], Any]:
        function: Callable[[Any], Any] = tf.function(
            lambda inputs: self._outputs(inputs, training=False), reduce_retracing=True, autograph=False
        )
        return function

    def _reset(self) -> None:
        self._model.reset_metrics()
        self._loss.reset_state()

    @cached_property
    def _reset_function(self) -> Callable[[], None]:
        """Resets on this process's replicas; from outside of a step TensorFlow would ask all processes each time."""
        function: Callable[[], None] = tf.function(lambda: self._strategy.run(self._reset), autograph=False)
        return function

    def _compiled(self, step: Callable[..., None], columns: list[list[Any]], terms: Terms) -> Callable[..., None]:
        """Returns a function that runs a step on all replicas, for batches of any size.

        It is compiled once: by itself TensorFlow compiles anew for some sizes, so that the last bits of a step would
        depend on those before it.
        """
        model, strategy = self._model, self._strategy

        def on_replica(columns: list[list[Any]], terms: Terms) -> None:
            replica = int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))
            step(*(column[self._own.index(replica)] for column in columns), terms)
            if step == self._train_step:
                self._average_statistics()

        def run(columns: list[list[Any]], terms: Terms) -> None:
            strategy.run(on_replica, args=(columns, terms))

        if model.run_eagerly:
            return run
        of_any_size = [
            [tf.TensorSpec([None, *each.shape[1:]], each.dtype) for each in column] for column in columns[:2]
        ]
        numbers, of_terms = tf.nest.map_structure(tf.TensorSpec.from_tensor, (columns[2:], terms))
        signature = [of_any_size + numbers, of_terms]
        compiled: Callable[..., None] = tf.function(run, input_signature=signature, autograph=False)
        return compiled

    def _average_statistics(self) -> None:
        """Sets this replica's statistics to the mean over all; each has seen its own part of the batch."""
        if self._replicas == 1 or not self._resident.buffers:
            return
        variables = list(self._resident.buffers.values())
        own = [tf.identity(tf.convert_to_tensor(variable)) for variable in variables]
        means = tf.distribute.get_replica_context().all_reduce("mean", own)
        for variable, mean in zip(variables, means, strict=True):
            variable.assign(mean)

    def _jitted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function as XLA compiles it, if the model was compiled with ``jit_compile``."""
        if not self._model.jit_compile or self._model.run_eagerly:
            return function
        compiled: Callable[..., Any] = tf.function(function, jit_compile=True)
        return compiled

    def _train_step(self, inputs: Any, targets: Any, counted: Any, share: Any, terms: Terms) -> None:
        optimizer, variables = self._model.optimizer, self._model.trainable_variables
        outputs, loss, gradients = self._gradients(inputs, targets, share, terms)
        optimizer.apply(self._clipped(gradients), variables)
        self._count(inputs, targets, outputs, loss, counted)

    def _test_step(self, inputs: Any, targets: Any, counted: Any, _terms: Terms) -> None:
        outputs, loss = self._measures(inputs, targets)
        self._count(inputs, targets, outputs, loss, counted)

    @cached_property
    def _gradients(self) -> Callable[..., tuple[Any, Any, list[Any]]]:
        """What a step does before replicas exchange anything; XLA compiles no exchange."""

        def gradients(inputs: Any, targets: Any, share: Any, terms: Terms) -> tuple[Any, Any, list[Any]]:
            model = self._model
            variables = model.trainable_variables
            with tf.GradientTape() as tape:
                outputs = self._outputs(inputs, training=True)
                loss = model.compute_loss(x=inputs, y=targets, y_pred=outputs, training=True)
                objective = tf.cast(loss, tf.float32) * share
                objective += self._term(variables, terms) / self._replicas
                scaled = model.optimizer.scale_loss(objective)
            return outputs, loss, tape.gradient(scaled, variables)

        return self._jitted(gradients)

    @cached_property
    def _measures(self) -> Callable[..., tuple[Any, Any]]:
        """What a step of an evaluation does before that."""

        def measures(inputs: Any, targets: Any) -> tuple[Any, Any]:
            outputs = self._outputs(inputs, training=False)
            return outputs, self._model.compute_loss(x=inputs, y=targets, y_pred=outputs, training=False)

        return self._jitted(measures)

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
        objective, paths, terms = broadcast.objective, list(self._resident.params), {}
        if objective.proximal:
            terms["proximal"] = tf.constant(objective.proximal, tf.float32)
            terms["start"] = [tf.constant(broadcast.model.params[path]) for path in paths]
        if objective.correction:
            terms["correction"] = [tf.constant(objective.correction[path]) for path in paths]
        return terms

    @staticmethod
    def _term(variables: Sequence[Any], terms: Terms) -> Any:
        """``⟨correction, w⟩ + (proximal / 2)·‖w − w_global‖²``."""
        total = tf.constant(0.0)
        values = [tf.convert_to_tensor(variable) for variable in variables]
        if "proximal" in terms:
            pairs = zip(values, terms["start"], strict=True)
            distances = [tf.reduce_sum(tf.square(value - first)) for value, first in pairs]
            total += terms["proximal"] / 2 * tf.add_n([tf.cast(distance, tf.float32) for distance in distances])
        if "correction" in terms:
            products = [
                tf.reduce_sum(tf.cast(coefficients, value.dtype) * value)
                for value, coefficients in zip(values, terms["correction"], strict=True)
            ]
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
