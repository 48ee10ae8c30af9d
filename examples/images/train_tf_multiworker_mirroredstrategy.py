"""Trains on the GPUs of several workers, with TensorFlow's MultiWorkerMirroredStrategy; run_tf_mwms.sh starts two."""

from __future__ import annotations

import os
import re
from functools import partial

import images
import images_tf
import shoal
from shoal.devices import tensorflow_config
from shoal.errors import ConfigurationError

ADDRESS = re.compile(r"[^\s:/]+:\d{1,5}")


def addresses(text: str | None) -> list[str]:
    """Returns where the workers meet, from HOST:PORT,HOST:PORT.

    Raises:
        ConfigurationError: There is nothing, or something else.
    """
    if not text:
        raise ConfigurationError(
            "nothing says where the workers are: use ./run_tf_mwms.sh for two on this machine, or for each worker the "
            "same --workers HOST:PORT,HOST:PORT"
        )
    workers = text.split(",")
    for worker in workers:
        if not ADDRESS.fullmatch(worker):
            raise ConfigurationError(f"--workers {text} must be HOST:PORT,HOST:PORT, and {worker!r} is not HOST:PORT")
        if workers.count(worker) > 1:
            raise ConfigurationError(f"--workers {text} has {worker} twice: each worker needs a port of its own")
    return workers


def tell_tensorflow(index: int, workers: list[str]) -> None:
    """Tells TensorFlow, by its environment, who the workers are and which this is.

    Raises:
        ConfigurationError: There is no such worker, or somebody has told it already.
    """
    if index >= len(workers):
        raise ConfigurationError(f"-wi {index} is not among the {len(workers)} workers: use 0 to {len(workers) - 1}")
    if "TF_CONFIG" in os.environ:
        raise ConfigurationError("TF_CONFIG is set, and this script makes it from -wi and --workers: unset TF_CONFIG")
    os.environ["TF_CONFIG"] = tensorflow_config(workers, index)


def gpus_each(accelerator: str, wanted: int | None) -> int:
    """Returns how many GPUs this worker uses, as does each of the others; 0 for its CPU.

    Raises:
        ConfigurationError: There are fewer than were asked for.
        MissingExtraError: There is no TensorFlow.
    """
    present = 0 if accelerator == "cpu" else images_tf.gpus_seen()
    if wanted is None or wanted <= present:
        return wanted or present
    if accelerator == "cpu":
        raise ConfigurationError(f"-n {wanted} is a number of GPUs, and a CPU is one device: leave -n out")
    fewer = f"use -n {present}" if present else "leave -n out, and each worker trains on its CPU"
    raise ConfigurationError(f"-n {wanted} GPUs were asked for, and this worker sees {present}: {fewer}")


def main() -> None:
    parser = images.Parser(__doc__, run_dir="runs/tf_multiworker")
    images_tf.add_model(parser)
    add = parser.add_argument
    add("-n", "--n-gpus", type=images.positive, help="the first N GPUs of each worker (all that it sees)")
    add("-wi", "--worker-index", type=images.natural, required=True, help="which worker this is; 0 is the chief")
    add("--workers", metavar="HOST:PORT,…", help="where the workers are, in order ($WORKERS)")
    arguments = parser.parse_args()
    index = arguments.worker_index
    with images.told_in_one_line(f"worker {index}"):
        workers = addresses(arguments.workers or os.environ.get("WORKERS"))
        tell_tensorflow(index, workers)
        hosts = [worker.partition(":")[0] for worker in workers]
        gpus = gpus_each(arguments.accelerator, arguments.n_gpus)
        count = max(gpus, 1) * len(workers)
        devices = shoal.Devices(
            "multiworker",
            count=count,
            accelerator=arguments.accelerator,
            ids=range(gpus) if gpus else None,
            precision=arguments.precision,
        )
        images.train(
            arguments,
            devices,
            count,
            partial(images_tf.learner, arguments),
            threads=images.readers(hosts.count(hosts[index])),
            leads=index == 0,
        )


if __name__ == "__main__":
    main()
