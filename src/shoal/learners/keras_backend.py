"""TensorFlow and Keras, imported in the one way in which they work together."""

from __future__ import annotations

import os
import sys

from shoal.errors import ConfigurationError, MissingExtraError

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # whatever the user's own ~/.keras says
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

_backend = sys.modules["keras"].backend.backend() if "keras" in sys.modules else os.environ["KERAS_BACKEND"]
if _backend != "tensorflow":  # before TensorFlow is imported, which may not get on with torch's libraries
    raise ConfigurationError(
        f"Keras computes with {_backend} in this process, and shoal's Keras learner with TensorFlow: "
        "set KERAS_BACKEND=tensorflow before Python starts"
    )

try:
    import tensorflow as tf
except ModuleNotFoundError as missing:
    raise MissingExtraError("tensorflow", purpose="train a Keras model", extra="tensorflow") from missing

import keras  # noqa: E402 - after the look at its backend

__all__ = ["keras", "tf"]
