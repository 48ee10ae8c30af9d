"""The devices of a Keras learner."""

from __future__ import annotations

from functools import cache
from typing import Any

from shoal.devices import Devices
from shoal.errors import ConfigurationError
from shoal.learners.keras_backend import tf

STRATEGIES = ("single", "mirrored")
"""What a Keras learner can spread over."""


def check_strategy(devices: Devices) -> None:
    """Refuses what is another framework's.

    Raises:
        ConfigurationError: It is.
    """
    if devices.strategy not in STRATEGIES:
        raise ConfigurationError(
            f"strategy {devices.strategy!r} is torch's; a Keras model trains with {' or '.join(map(repr, STRATEGIES))}"
        )


@cache
def strategy_of(devices: Devices) -> Any:
    """Returns TensorFlow's strategy for devices; the same one for the same devices.

    GPUs take memory as they need it. On a machine without one, ``mirrored`` has as many logical CPU devices as were
    asked for.

    Raises:
        ConfigurationError: The devices are not there, or TensorFlow has already started with others.
    """
    check_strategy(devices)
    _set_threads(devices)
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


def started() -> bool:
    """Tells whether TensorFlow has started its threads and devices in this process."""
    from tensorflow.python.eager import context  # there is no public name for it

    return context.context()._context_handle is not None  # noqa: SLF001


def _gpus(devices: Devices) -> list[int]:
    """Returns the indices of the GPUs to use; none for the CPU."""
    if devices.accelerator == "cpu":
        return []
    present = tf.config.list_physical_devices("GPU")
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
