"""Trains on several GPUs of this machine from one process, with TensorFlow's MirroredStrategy."""

from __future__ import annotations

from functools import partial

import images
import images_tf
import shoal
from shoal.errors import ConfigurationError


def require_gpus(count: int) -> None:
    """Makes sure that there are so many.

    Raises:
        ConfigurationError: There are fewer.
        MissingExtraError: There is no TensorFlow.
    """
    present = images_tf.gpus_seen()
    if not present:
        raise ConfigurationError(
            f"-n {count} GPUs were asked for, and TensorFlow sees none: use --accelerator cpu for as many logical ones"
        )
    if count > present:
        raise ConfigurationError(f"-n {count} GPUs were asked for, and there are {present}: use -n {present}")


def main() -> None:
    parser = images.Parser(__doc__, run_dir="runs/tf_mirrored")
    images_tf.add_model(parser)
    parser.add_argument(
        "-n", "--n-gpus", type=images.positive, default=8, help="the first N GPUs, or N devices of a CPU (%(default)s)"
    )
    arguments = parser.parse_args()
    count = arguments.n_gpus
    with images.told_in_one_line():
        devices = shoal.Devices(
            "mirrored", count=count, accelerator=arguments.accelerator, precision=arguments.precision
        )
        if arguments.accelerator != "cpu":
            require_gpus(count)
        make = partial(images_tf.learner, arguments)
        images.train(arguments, devices, count, make, threads=images.readers(1))


if __name__ == "__main__":
    main()
