"""Trains on one or several machines with a process for each device, which torchrun or run_torch_ddp.sh starts."""

from __future__ import annotations

from functools import partial

import images
import shoal
from images_torch import learner
from shoal.devices import Launched


def main() -> None:
    parser = images.Parser(__doc__, run_dir="runs/torch_ddp")
    parser.add_argument("--local-rank", "--local_rank", type=int, help="not needed: the environment says it too")
    arguments = parser.parse_args()
    with images.told_in_one_line():
        launched = Launched.here()
    place = launched or Launched.alone()
    with images.told_in_one_line(f"rank {place.rank}" if launched else None):
        devices = shoal.Devices("ddp", accelerator=arguments.accelerator, precision=arguments.precision)
        make = partial(learner, arguments, sharing=place.local_count)
        images.train(arguments, devices, place.count, make, leads=place.rank == 0)


if __name__ == "__main__":
    main()
