"""The specification of a learner's devices. It names no framework; each learner turns it into its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from shoal.errors import ConfigurationError, unknown_name

Strategy = Literal["single"]
Accelerator = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Devices:
    """How one learner spreads over devices.

    Example::

        Devices("single", accelerator="cuda", id=1)

    Raises:
        ConfigurationError: The strategy, accelerator or precision does not exist, or the id cannot be.
    """

    strategy: Strategy = "single"
    """``single``: one device holds the model and all of the batch."""
    accelerator: Accelerator = "auto"
    """``cpu``, ``cuda``, or ``auto``: CUDA where there is a CUDA device, else the CPU."""
    id: int | None = None
    """The index of the CUDA device; None for the current one."""
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
        if self.id is not None and (self.id < 0 or self.accelerator == "cpu"):
            raise ConfigurationError(
                f"device id {self.id} was asked for with accelerator {self.accelerator!r}; "
                "an id ≥ 0 selects a CUDA device: use accelerator='cuda', or leave the id out"
            )
