"""A site's own script with TensorFlow's ``MultiWorkerMirroredStrategy``, in a loop of its own."""

from __future__ import annotations

import sys

import numpy as np
import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()  # where TF_CONFIG says, before anything of shoal

import shoal.client  # noqa: E402
from keras_reference import clients  # noqa: E402
from keras_site import made  # noqa: E402


def main():
    """Trains on all of this site's examples twice in each round, half of them on each worker."""
    inputs, targets = clients()[shoal.client.config()["client"]].take(np.arange(6))
    with strategy.scope():
        model = made(statistics=False)
        model.optimizer.build(model.trainable_variables)

    def step(inputs, targets):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=targets, y_pred=model(inputs, training=True))
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    run = tf.function(lambda *batch: strategy.run(step, args=batch))
    place = strategy.cluster_resolver.task_id
    mine = [tf.constant(part[place::2]) for part in (inputs, targets)]
    for task in shoal.client.tasks():
        task.load(model)
        for _ in range(2):
            run(*mine)
        task.reply(params=model, examples=6)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
