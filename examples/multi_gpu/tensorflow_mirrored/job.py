"""Federates several sites, each of which trains with Keras, mirrored over devices of its own."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import shoal
from data import at_hand
from shoal.errors import RunInterrupted, ShoalError, by_sigterm

HERE = Path(__file__).parent


def main() -> None:
    args = arguments()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of the sites, too: no more than what may be wrong
    try:
        job = make(args)
        if args.export_config is not None:
            job.export(args.export_config)
            print(f"run it with: shoal federate {args.export_config}")
        else:
            train, _ = at_hand(args.data_dir)
            print(f"the images are those of {train.name}", flush=True)
            job.run(run_dir=args.run_dir, resume=args.resume, callbacks=[shoal.Progress()], verbose=args.verbose)
    except RunInterrupted as interrupt:
        print(f"job.py: {interrupt}; to go on: the same command with --resume", file=sys.stderr)
        sys.exit(143 if by_sigterm(interrupt) else 130)
    except (ShoalError, KeyboardInterrupt) as error:
        print(*getattr(error, "__notes__", ()), f"job.py: {error}", sep="\n", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def make(args: argparse.Namespace) -> shoal.Job:
    """Returns the federation that the arguments describe."""
    from model import make_net  # TensorFlow, after its log's level is set

    words = ["--parts", args.n_clients, "--seed", args.seed]
    words += ["--devices", args.devices_per_client, "--accelerator", args.accelerator]
    for name in ("data_dir", "images", "alpha", "batch_size", "lr", "local_epochs"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", value]
    mirrored = shoal.Devices("mirrored", count=args.devices_per_client)  # one process, with all of them
    return shoal.Job(
        "tensorflow_mirrored",
        script=HERE / "client.py",
        args=[str(word) for word in words],
        model=make_net,
        sites=[
            shoal.Site(f"site-{part + 1}", devices=mirrored, args=["--part", str(part)])
            for part in range(args.n_clients)
        ],
        rounds=args.num_rounds,
        accelerator=args.accelerator,
        share_devices=args.share_devices,
        seed=args.seed,
        settings={"tensorboard": args.use_tracking},
    )


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--n_clients", type=int, default=2, help="number of sites (%(default)s)")
    add("--num_rounds", type=int, default=5, help="(%(default)s)")
    add("--devices_per_client", type=int, default=2, help="GPUs, or logical ones of a CPU, of each site (%(default)s)")
    add("--accelerator", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where there are any")
    add("--share_devices", action="store_true", help="let sites use the same GPU")
    add("--data_dir", type=lambda text: Path(text).resolve(), help="where CIFAR-10 or Fashion-MNIST lies")
    add("--images", type=int, help="use only so many training images, of all sites together")
    add("--alpha", type=float, help="skew the sites' labels by Dirichlet(alpha); small is more")
    add("--batch_size", type=int, help="of each device")
    add("--lr", type=float, help="learning rate")
    add("--local_epochs", type=int, help="passes over a site's images in a round")
    add("--seed", type=int, default=0, help="decides all randomness (%(default)s)")
    add("--run_dir", "--run-dir", type=Path, default=Path("runs/tensorflow_mirrored"),
        help="for all results (%(default)s)")  # fmt: skip
    add("--resume", action="store_true", help="go on with the run in --run_dir")
    add("--use_tracking", action="store_true", help="write TensorBoard events to --run_dir")
    add("--export_config", type=Path, nargs="?", const=Path("jobs/tensorflow_mirrored"), metavar="FOLDER",
        help="write the job to a folder (%(const)s) instead of running it")  # fmt: skip
    add("--verbose", action="store_true", help="show what all processes write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
