"""A training for ``shoal train``, of a small Keras model whose last batch does not divide."""

from __future__ import annotations

import shoal
from keras_reference import CLASSES, FEATURES, data
from shoal.learners.keras_backend import keras


def made():
    """Returns a model whose optimizer has a state, and limits the gradient of a whole batch."""
    layers = [keras.Input((FEATURES,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(CLASSES)]
    model = keras.Sequential(layers)
    optimizer = keras.optimizers.Adam(0.01, global_clipnorm=0.5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def training(epochs: int = 5, batch_size: int = 8, calls: bool = False):
    """Returns 5 epochs of 5 steps of 16 examples in all; the last has 11.

    Args:
        epochs: How many.
        batch_size: Of each device.
        calls: Whether there are callbacks: one that writes, and one that halves the rate now and then.
    """
    halving = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=3, min_delta=9.0, mode="min")
    callbacks = [keras.callbacks.CSVLogger("/dev/null", append=True), halving] if calls else []
    learner = shoal.KerasLearner(made, batch_size=batch_size, callbacks=callbacks)
    return shoal.Training(learner=learner, data=data(75), epochs=epochs, evaluate=data(21, 1), name="keras")
