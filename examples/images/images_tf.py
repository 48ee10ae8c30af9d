"""The trainings with TensorFlow: the models, and how they are trained.

Keras is imported within the functions, after shoal has seen to its backend, and told what to install where it is not.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import shoal
from images import SMALLEST, STRENGTH, Images, Parser

EFFICIENTNET = 32
"""Height and width of the least that EfficientNet takes."""


def add_model(parser: Parser) -> None:
    """Adds the argument that selects the model."""
    parser.add_argument(
        "--model",
        choices=("small", "efficientnet-b2"),
        default="small",
        help="a small residual network, or EfficientNet-B2, both of random weights (%(default)s)",
    )


def gpus_seen() -> int:
    """Returns how many GPUs TensorFlow sees.

    Raises:
        MissingExtraError: There is no TensorFlow.
    """
    shoal.KerasLearner  # noqa: B018 - imports TensorFlow and Keras
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))


def learner(arguments: argparse.Namespace, data: Images, batch_size: int) -> shoal.KerasLearner:
    """Returns what trains on the images.

    Args:
        arguments: As :class:`images.Parser` has them, and the model.
        data: The images.
        batch_size: How many a device has in a step.
    """
    make = partial(
        compiled,
        arguments.model,
        size=data.size,
        channels=data.channels,
        classes=data.classes,
        augment=arguments.augment,
        learning_rate=arguments.learning_rate,
    )
    return shoal.KerasLearner(make, batch_size=batch_size)


def compiled(name: str, *, size: int, channels: int, classes: int, augment: bool, learning_rate: float) -> Any:
    """Returns a compiled ``keras.Model`` of images [n, channels, size, size] of 8 bits.

    Args:
        name: Of the model.
        size: The images' height and width.
        channels: 3, or 1 for images without colours.
        classes: How many there are.
        augment: Whether half of the images are flipped in training, and brightness and contrast of each are changed.
        learning_rate: Of Adam.
    """
    import keras
    from keras import layers

    inputs = keras.Input((channels, size, size), dtype="uint8")
    pictures = layers.Permute((2, 3, 1))(layers.Rescaling(1 / 255)(inputs))
    if channels == 1:
        pictures = layers.Concatenate()([pictures] * 3)
    if augment:
        pictures = layers.RandomFlip("horizontal")(pictures)
        pictures = layers.RandomContrast(STRENGTH, (0, 1))(pictures)
        pictures = layers.RandomBrightness(STRENGTH, (0, 1))(pictures)
    scores = (efficientnet if name == "efficientnet-b2" else residual)(pictures, classes)
    model = keras.Model(inputs, layers.Activation("linear", dtype="float32")(scores))
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def residual(pictures: Any, classes: int, width: int = 16) -> Any:
    """Returns the scores of a small residual network, as deep as the pictures are large.

    Its layers are those of the network in ``images_torch.py``. GroupNormalization knows no batch, so devices can share
    one exactly.

    Args:
        pictures: A tensor of Keras's [n, size, size, 3], in 0 to 1.
        classes: How many there are.
        width: Channels of the first layer; each block doubles them.
    """
    from keras import layers

    convolution = partial(layers.Conv2D, padding="same", use_bias=False)
    normalized = partial(layers.GroupNormalization, groups=8, epsilon=1e-5)
    size = pictures.shape[1]
    inner = normalized()(convolution(width, 3)(pictures))
    while size // 2 >= SMALLEST:
        size, width = size // 2, 2 * width
        body = layers.ReLU()(normalized()(convolution(width, 3, strides=2)(inner)))
        body = normalized()(convolution(width, 3)(body))
        skip = convolution(width, 3, strides=2)(inner)
        inner = layers.ReLU()(layers.Add()([body, skip]))
    return layers.Dense(classes)(layers.GlobalAveragePooling2D()(inner))


def efficientnet(pictures: Any, classes: int) -> Any:
    """Returns the scores of EfficientNet-B2; small pictures are given a black border.

    Args:
        pictures: A tensor of Keras's [n, size, size, 3], in 0 to 1.
        classes: How many there are.
    """
    import keras

    missing = EFFICIENTNET - pictures.shape[1]
    if missing > 0:
        border = missing // 2, missing - missing // 2
        pictures = keras.layers.ZeroPadding2D((border, border))(pictures)
    network = keras.applications.EfficientNetB2(
        weights=None, input_shape=pictures.shape[1:], classes=classes, classifier_activation=None
    )
    return network(keras.layers.Rescaling(255)(pictures))  # it divides by that itself
