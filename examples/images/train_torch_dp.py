"""Trains on several GPUs of this machine from one process, with torch's DataParallel."""

from __future__ import annotations

from functools import partial

import torch

import images
import shoal
from images_torch import learner
from shoal.errors import ConfigurationError


def require_gpus(count: int) -> None:
    """Makes sure that there are so many.

    Raises:
        ConfigurationError: There are fewer.
    """
    present = torch.cuda.device_count()
    if not present:
        raise ConfigurationError(
            "DataParallel copies the model among CUDA GPUs, and torch sees none: use train_torch_ddp.py"
        )
    if count > present:
        raise ConfigurationError(f"-n {count} GPUs were asked for, and there are {present}: use -n {present}")


def main() -> None:
    parser = images.Parser(__doc__, run_dir="runs/torch_dp")
    parser.add_argument("-n", "--n-gpus", type=images.positive, default=8, help="the first N GPUs (%(default)s)")
    arguments = parser.parse_args()
    with images.told_in_one_line():
        devices = shoal.Devices(
            "dp", count=arguments.n_gpus, accelerator=arguments.accelerator, precision=arguments.precision
        )
        require_gpus(arguments.n_gpus)
        images.train(arguments, devices, arguments.n_gpus, partial(learner, arguments))


if __name__ == "__main__":
    main()
