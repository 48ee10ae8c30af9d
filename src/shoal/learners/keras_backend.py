"""TensorFlow and Keras, imported in the one way in which they work together."""

from __future__ import annotations

import os

from shoal.errors import ConfigurationError, MissingExtraError

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # whatever the user's own ~/.keras says
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

try:
    import tensorflow as tf
except ModuleNotFoundError as missing:
    raise MissingExtraError("tensorflow", purpose="train a Keras model", extra="tensorflow") from missing

import keras

if keras.backend.backend() != "tensorflow":
    raise ConfigurationError(
        f"Keras computes with {keras.backend.backend()} in this process, and shoal's Keras learner with TensorFlow: "
        "set KERAS_BACKEND=tensorflow before Python starts"
    )

__all__ = ["keras", "tf"]
