"""A site's own training of a CNN with Keras, mirrored over all devices of the site. job.py has each site run it.

By itself it trains on all of the data: `python client.py --devices 2 --local_epochs 5`.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import keras
import tensorflow as tf

import shoal.client
from data import site_images
from model import make_net


def main() -> None:
    args = arguments()
    strategy = mirrored(args.devices, args.accelerator)
    (images, labels), test, told = site_images(
        args.data_dir, part=args.part, parts=args.parts, alpha=args.alpha, most=args.images, seed=args.seed
    )
    print(told, flush=True)
    keras.utils.set_random_seed(args.seed)
    with strategy.scope():
        model = make_net(args.lr)  # once: it stays from round to round, and so do the steps that Keras compiles
        model.optimizer.build(model.trainable_variables)
    fresh = [variable.numpy() for variable in model.optimizer.variables]
    replicas = strategy.num_replicas_in_sync
    measure = partial(model.evaluate, *test, batch_size=500 * replicas, verbose=0, return_dict=True)

    for task in shoal.client.tasks(evaluate=True):
        task.load(model)  # with the proximal term of FedProx, say, among its losses
        if task.kind == "evaluate":  # the global model, after a round
            task.reply(examples=len(test[0]), metrics=measure())
            continue
        # Momentum begins anew in each round: what is left of it points on from where this site ended, but the round
        # begins at the average of all sites. Without a state a site is also the same after a restart or a resume.
        for variable, value in zip(model.optimizer.variables, fresh, strict=True):
            variable.assign(value)
        keras.utils.set_random_seed(task.seed % 2**32)  # decides the order of the images
        trained = model.fit(
            images, labels, batch_size=args.batch_size * replicas, epochs=args.local_epochs, verbose=0
        ).history
        print(f"round {task.round}: loss {trained['loss'][-1]:.4f}", flush=True)
        task.reply(params=model, examples=len(images), metrics=measure() | {"loss": trained["loss"][-1]})


def mirrored(count: int, accelerator: str) -> tf.distribute.MirroredStrategy:
    """Returns a strategy over GPUs or, where TensorFlow sees none, over as many logical devices of the CPU."""
    gpus = [] if accelerator == "cpu" else tf.config.list_physical_devices("GPU")
    if len(gpus) < count and (gpus or accelerator == "cuda"):
        sys.exit(f"client.py: --devices {count}, and TensorFlow sees {len(gpus)} GPUs: --accelerator cpu uses none")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)  # and not all of it at once
    if not gpus:
        [cpu] = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    return tf.distribute.MirroredStrategy([f"{'GPU' if gpus else 'CPU'}:{index}" for index in range(count)])


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", type=Path, help="where CIFAR-10 or Fashion-MNIST lies")
    add("--images", type=int, help="use only so many training images, of all sites together")
    add("--part", type=int, default=0, help="which site's part of the images to take")
    add("--parts", type=int, default=1, help="how many sites share them")
    add("--alpha", type=float, help="skew the sites' labels by Dirichlet(alpha)")
    add("--devices", type=int, default=1, help="GPUs, or logical devices of a CPU, to train on")
    add("--accelerator", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where there are any")
    add("--batch_size", type=int, default=32, help="of each device")
    add("--lr", type=float, default=0.02)
    add("--local_epochs", type=int, default=1, help="passes over the site's images in a round")
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
