"""Trains on one or several machines with a process for each device, which torchrun or run_torch_ddp.sh starts."""

from __future__ import annotations

import images
import shoal
from shoal.devices import Launched


def main() -> None:
    parser = images.Parser(__doc__, run_dir="runs/torch_ddp")
    parser.add_argument("--local-rank", "--local_rank", type=int, help="not needed: the environment says it too")
    arguments = parser.parse_args()
    with images.told_in_one_line():
        place = Launched.here()
    with images.told_in_one_line(place):
        devices = shoal.Devices("ddp", accelerator=arguments.accelerator, precision=arguments.precision)
        images.train(arguments, devices, place.count if place else 1, place)


if __name__ == "__main__":
    main()
