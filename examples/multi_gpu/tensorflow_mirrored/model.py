"""The CNN of PyTorch's CIFAR-10 tutorial, with Keras."""

import keras
from keras import layers

SIZE = 32
"""Height and width of the images that its convolutions take."""


def make_net(lr: float = 0.02) -> keras.Model:
    """Returns it compiled: two convolutions and three dense layers, 62,006 parameters.

    It takes images [n, height, width, 1 or 3] from 0 to 255, and gives scores [n, 10].
    """
    images = keras.Input((None, None, None))
    x = Colours()(images)
    x = layers.MaxPooling2D()(layers.Conv2D(6, 5, activation="relu", name="conv1")(x))
    x = layers.MaxPooling2D()(layers.Conv2D(16, 5, activation="relu", name="conv2")(x))
    x = layers.Dense(120, activation="relu", name="fc1")(layers.Flatten()(x))
    x = layers.Dense(84, activation="relu", name="fc2")(x)
    model = keras.Model(images, layers.Dense(10, name="fc3")(x), name="net")
    model.compile(
        keras.optimizers.SGD(lr, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


class Colours(layers.Layer):
    """Makes images [n, 32, 32, 3] from -1 to 1; those of another data set than CIFAR-10 are fitted to it."""

    def call(self, images: keras.KerasTensor) -> keras.KerasTensor:
        """Returns them."""
        scaled = keras.ops.image.resize(images / 127.5 - 1, (SIZE, SIZE))
        return keras.ops.broadcast_to(scaled, (keras.ops.shape(images)[0], SIZE, SIZE, 3))
