"""A small federation of Keras clients, and a program that runs it on two engines."""

from __future__ import annotations

import json
import sys

import shoal
from keras_reference import CLASSES, FEATURES, clients
from shoal.errors import ConfigurationError
from shoal.learners.keras_backend import keras


def make():
    """Returns a compiled linear model of zeros."""
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(CLASSES, kernel_initializer="zeros")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    return model


def learner(**settings):
    """Returns a learner of it."""
    return shoal.KerasLearner(make, **{"batch_size": 4, "epochs": 2, **settings})


def main(*engines):
    """Runs it on some engines and then on the sequential one; tells the last models, and how a second try ends."""
    told = {}
    for engine in (*engines, "sequential"):
        result = shoal.federate(learner(), clients(), rounds=3, cohort=4, engine=engine)
        told[engine] = {name: array.tobytes().hex() for name, array in result.params.items()}
    try:
        shoal.federate(learner(), clients(), rounds=1, engine="process")
    except ConfigurationError as error:
        told["refused"] = str(error)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
