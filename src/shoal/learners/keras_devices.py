"""The devices of a Keras learner."""

from __future__ import annotations

import dataclasses
import os
import signal
from functools import cache
from typing import Any

from shoal.devices import REUSE_PORT, WORKERS, Devices, Launched
from shoal.errors import ConfigurationError, WorkerError
from shoal.learners.keras_backend import tf
from shoal.learners.keras_cluster import Cluster, reason
from shoal.learners.keras_meeting import meet
from shoal.processes.handlers import handler_kept

STRATEGIES = ("single", "mirrored", "multiworker")
"""What a Keras learner can spread over."""


def check_strategy(devices: Devices) -> None:
    """Refuses what is another framework's.

    Raises:
        ConfigurationError: It is.
    """
    if devices.strategy not in STRATEGIES:
        raise ConfigurationError(
            f"strategy {devices.strategy!r} is torch's; a Keras model trains with {', '.join(map(repr, STRATEGIES))}"
        )


def strategy_of(devices: Devices) -> Any:
    """Returns TensorFlow's strategy for devices; the same one for the same devices, whatever the precision.

    GPUs take memory as they need it. On a machine without one, ``mirrored`` has as many logical CPU devices as were
    asked for.

    Raises:
        ConfigurationError: The devices are not there, or TensorFlow has already started with others; or no launcher has
            started workers.
        WorkerError: The other workers did not come.
    """
    check_strategy(devices)
    return _strategy(dataclasses.replace(devices, precision="fp32"))


@cache
def _strategy(devices: Devices) -> Any:
    _set_threads(devices)
    if devices.strategy == "multiworker":
        return _of_workers(devices)
    gpus = _gpus(devices)
    if devices.strategy == "single":
        return tf.distribute.OneDeviceStrategy(f"/gpu:{gpus[0]}" if gpus else "/cpu:0")
    if gpus:
        return tf.distribute.MirroredStrategy([f"/gpu:{index}" for index in gpus])
    count = devices.count or 1
    _divide_cpu(count)
    # Its own way, by collective operations, allows only one number of replicas in the life of a process.
    summing = tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy([f"/cpu:{index}" for index in range(count)], cross_device_ops=summing)


def _of_workers(devices: Devices) -> Any:
    """Meets the other workers; returns the strategy that they have together."""
    cluster = Cluster.here()
    if cluster is None:
        raise ConfigurationError(
            "strategy 'multiworker' has a process for each device, and nothing says which this is: start it with "
            f"`shoal train … --strategy multiworker --devices {devices.count or 2}`, or set TF_CONFIG"
        )
    if started():
        raise ConfigurationError(
            "TensorFlow has started before its workers have met: make the learner's model before anything is computed"
        )
    _show_gpus(devices, cluster)
    cluster.announce()
    if WORKERS in os.environ:  # whoever has found the ports holds them
        os.environ[REUSE_PORT] = "true"
    meet(cluster.workers, cluster.index, shared=os.environ.get(REUSE_PORT) == "true")
    try:
        with handler_kept(signal.SIGTERM):  # TensorFlow would note it and go on
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError) as error:
        names = ", ".join(cluster.workers)
        raise WorkerError(f"the {len(cluster.workers)} workers {names} did not meet: {reason(error)}") from error
    found = strategy.num_replicas_in_sync
    if devices.count not in {None, found}:
        raise ConfigurationError(f"{devices.count} devices were asked for, and the workers have {found} together")
    return strategy


def _show_gpus(devices: Devices, cluster: Cluster) -> None:
    """Has TensorFlow see the GPUs of this worker alone."""
    present = tf.config.list_physical_devices("GPU")
    every = _gpus(dataclasses.replace(devices, strategy="mirrored", count=None))
    if not every:
        return
    place = Launched.here()
    if cluster.shares_machine and place is not None:
        if place.local_rank >= len(every):
            raise ConfigurationError(
                f"{place.local_count} workers on this machine want a GPU each, and there are {len(every)}: "
                "use fewer, or accelerator='cpu'"
            )
        every = [every[place.local_rank]]
    tf.config.set_visible_devices([present[index] for index in every], "GPU")


def hide_gpus() -> None:
    """Has TensorFlow leave all GPUs alone, if it has not started yet: others may want their memory."""
    if not started():
        tf.config.set_visible_devices([], "GPU")


def started() -> bool:
    """Tells whether TensorFlow has started its threads and devices in this process."""
    from tensorflow.python.eager import context  # there is no public name for it

    return context.context()._context_handle is not None  # noqa: SLF001


def _gpus(devices: Devices) -> list[int]:
    """Returns the indices of the GPUs to use; none for the CPU."""
    if devices.accelerator == "cpu":
        hide_gpus()
        return []
    present = tf.config.list_physical_devices("GPU")
    if not started():
        tf.config.set_visible_devices(present, "GPU")  # a learner on the CPU may have hidden them
    for gpu in present:
        _grow(gpu)
    if devices.ids is None and devices.accelerator == "auto" and not present:
        return []
    every = len(present) if devices.strategy == "mirrored" else 1
    wanted = list(range(devices.count or every) if devices.ids is None else devices.ids)
    if not present:
        raise ConfigurationError(
            f"a CUDA device was asked for, but tensorflow {tf.__version__} sees none; use accelerator='cpu', or "
            "install a build of TensorFlow with CUDA"
        )
    if not tf.config.get_visible_devices("GPU"):
        raise ConfigurationError(
            "TensorFlow has started without GPUs in this process, for a learner or a model on the CPU: use another "
            "process for CUDA devices"
        )
    if max(wanted) >= len(present):
        raise ConfigurationError(
            f"CUDA device {max(wanted)} was asked for, but TensorFlow sees {len(present)}: use 0 to {len(present) - 1}"
        )
    return wanted


def _grow(gpu: Any) -> None:
    """Has TensorFlow take a GPU's memory as it needs it, and not all at once."""
    try:
        tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError as error:
        if not tf.config.experimental.get_memory_growth(gpu):
            raise ConfigurationError(
                "TensorFlow has started, with all memory of the GPUs: make the learner's model before anything is "
                "computed, or set TF_FORCE_GPU_ALLOW_GROWTH=true"
            ) from error


def _divide_cpu(count: int) -> None:
    """Makes logical devices of the CPU."""
    [cpu] = tf.config.list_physical_devices("CPU")
    if len(tf.config.get_logical_device_configuration(cpu) or [None]) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(count)])
    except RuntimeError as error:
        raise ConfigurationError(
            f"TensorFlow has started with fewer logical CPU devices than the {count} that were asked for: make the "
            "learner's model before anything is computed with TensorFlow"
        ) from error


def _set_threads(devices: Devices) -> None:
    if devices.threads is None or tf.config.threading.get_intra_op_parallelism_threads() == devices.threads:
        return
    try:
        tf.config.threading.set_intra_op_parallelism_threads(devices.threads)
    except RuntimeError as error:
        raise ConfigurationError(
            f"TensorFlow has started, and cannot change to threads={devices.threads} any more: leave it out, or make "
            "the learner's model before anything is computed"
        ) from error
