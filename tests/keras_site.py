"""A site's own script that trains a Keras model with its ``fit``, on as many logical devices as it is told."""

from __future__ import annotations

import sys

import numpy as np

import shoal.client
from keras_reference import CLASSES, FEATURES, clients
from shoal.learners.keras_backend import keras, tf


def made(*, statistics=True):
    """Returns a model, with a BatchNorm or without."""
    layers = [keras.Input((FEATURES,)), keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.01))]
    layers += [keras.layers.BatchNormalization(momentum=0.5)] if statistics else []
    model = keras.Sequential([*layers, keras.layers.Dense(CLASSES)])
    model.compile(keras.optimizers.SGD(0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def main(count):
    """Trains on this site's examples, all in one batch, twice in each round."""
    cpus = [tf.config.LogicalDeviceConfiguration()] * count
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    names = [f"/cpu:{number}" for number in range(count)]
    strategy = tf.distribute.MirroredStrategy(names) if count > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        model = made(statistics=count == 1)
    inputs, targets = clients()[shoal.client.config()["client"]].take(np.arange(6))
    for task in shoal.client.tasks():
        task.load(model)
        model.fit(inputs, targets, batch_size=6, epochs=2, shuffle=False, verbose=0)
        task.reply(params=model, examples=6)


if __name__ == "__main__":
    main(int(sys.argv[1]))
