"""The specification of a learner's devices. It names no framework; each learner turns it into its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from shoal.errors import ConfigurationError, unknown_name

Strategy = Literal["single", "dp", "ddp", "fsdp", "mirrored", "multiworker"]
Accelerator = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]

RANKED = frozenset({"ddp", "fsdp", "multiworker"})
"""The strategies that have a process for each device."""

OF_TENSORFLOW = frozenset({"mirrored", "multiworker"})
"""The strategies that are TensorFlow's, and not torch's."""


@dataclass(frozen=True)
class Devices:
    """How one learner spreads over devices.

    Example::

        Devices("ddp", count=4, precision="bf16")
        Devices("single", accelerator="cuda", ids=[1])

    Raises:
        ConfigurationError: The strategy, accelerator or precision does not exist, or the count or ids cannot be.
    """

    strategy: Strategy = "single"
    """``single``: one device holds the model and all of the batch. ``dp``: one process, the model copied to each of
    several CUDA devices for each batch (torch's ``DataParallel``). ``ddp``: a process and a copy of the model for each
    device, gradients averaged (``DistributedDataParallel``). ``fsdp``: as ``ddp``, with parameters, gradients and
    optimizer state divided among the devices (``fully_shard``). ``mirrored``: one process, a copy of a Keras model on
    each device, gradients summed (TensorFlow's ``MirroredStrategy``). ``multiworker``: as ``mirrored``, with a process
    for each device (``MultiWorkerMirroredStrategy``), or for each machine where ``TF_CONFIG`` says so."""
    count: int | None = None
    """How many devices, on all machines together; None for those that a launcher has started processes for, or with
    ``dp`` and ``mirrored`` for all there are (of a CPU one)."""
    accelerator: Accelerator = "auto"
    """``cpu``, ``cuda``, or ``auto``: CUDA where there is a CUDA device, else the CPU."""
    ids: Sequence[int] | None = None
    """The indices of the CUDA devices on each machine; None for the first ones, or for the current one with
    ``single``."""
    threads: int | None = None
    """CPU threads that one operation may use, ≥ 1; None leaves it to the framework. Small models are as fast with one,
    and far faster where other processes want the cores too, because threads then wait for each other."""

    precision: Precision = "fp32"
    """``bf16`` or ``fp16``: matrix products and convolutions in 16 bits (autocast), the parameters and all sums as they
    are. ``fp16`` scales the loss, so that small gradients do not vanish."""

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise unknown_name("strategy", self.strategy, get_args(Strategy))
        if self.accelerator not in get_args(Accelerator):
            raise unknown_name("accelerator", self.accelerator, get_args(Accelerator))
        if self.precision not in get_args(Precision):
            raise unknown_name("precision", self.precision, get_args(Precision))
        if self.threads is not None and self.threads < 1:
            raise ConfigurationError(f"threads must be ≥ 1, not {self.threads}; None leaves it to the framework")
        if self.ids is not None:
            object.__setattr__(self, "ids", tuple(self.ids))  # comparable, and no one else's to change
            self._check_ids(tuple(self.ids))
        self._check_count()

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        if not ids or min(ids) < 0 or self.accelerator == "cpu":
            raise ConfigurationError(
                f"device ids {list(ids)} were asked for with accelerator {self.accelerator!r}; "
                "ids ≥ 0 select CUDA devices: use accelerator='cuda', or leave the ids out"
            )
        if len(set(ids)) < len(ids):
            raise ConfigurationError(f"device ids {list(ids)} name a device twice")
        if self.strategy == "single" and len(ids) > 1:
            raise ConfigurationError(f"strategy 'single' uses one device, not {list(ids)}: use 'ddp', 'fsdp' or 'dp'")
        if self.strategy in ("dp", "mirrored") and self.count not in {None, len(ids)}:
            raise ConfigurationError(f"{self.count} devices were asked for and {len(ids)} named: leave one out")

    def _check_count(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigurationError(f"the number of devices must be ≥ 1, not {self.count}")
        if self.strategy == "single" and self.count not in {None, 1}:
            raise ConfigurationError(f"strategy 'single' uses one device, not {self.count}: use 'ddp', 'fsdp' or 'dp'")
        if self.strategy == "dp" and self.accelerator == "cpu":
            raise ConfigurationError("strategy 'dp' copies a model among CUDA devices: on a CPU use 'ddp'")

    @property
    def ranked(self) -> bool:
        """Whether each device has a process of its own."""
        return self.strategy in RANKED
