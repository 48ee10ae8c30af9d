"""Devices as the command line asks for them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from shoal.devices import OF_TENSORFLOW, TF_CONFIG, Devices, Launched
from shoal.devices.spec import RANKED
from shoal.errors import ConfigurationError


def parse_device(text: str, precision: str | None = None) -> Devices:
    """Returns the devices that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` means.

    Args:
        text: One of these.
        precision: Of the computation; None for fp32.

    Raises:
        ConfigurationError: It is none of these.
    """
    accelerator, _, index = text.partition(":")
    if index and not index.isdigit():
        raise ConfigurationError(f"--device takes auto, cpu, cuda or cuda:NUMBER, not {text!r}")
    return Devices(
        accelerator=accelerator,  # type: ignore[arg-type]  # the specification refuses what it does not know
        ids=[int(index)] if index else None,
        precision=precision or "fp32",  # type: ignore[arg-type]  # likewise
    )


@dataclass(frozen=True, kw_only=True)
class AskedDevices:
    """What ``shoal train`` was told of its devices; None where it was told nothing."""

    count: int | None
    """On this machine."""
    strategy: str | None
    """One of those that :class:`~shoal.Devices` knows."""
    ids: tuple[int, ...] | None
    """Of CUDA devices."""
    accelerator: str | None
    """``auto``, ``cpu`` or ``cuda``."""
    precision: str | None
    """``fp32``, ``bf16`` or ``fp16``."""

    def processes(self) -> int:
        """Returns how many processes to start on this machine; 1 means that this one will do.

        Raises:
            ConfigurationError: There are fewer devices, or nothing says how many to use.
        """
        wanted = self._wanted()
        self._spec(1 if wanted is None else wanted)  # what cannot be is refused before a process starts
        present = None if self.strategy in OF_TENSORFLOW else self._present()
        if wanted is not None and present is not None and wanted > present:
            raise ConfigurationError(
                f"{wanted} CUDA devices were asked for, and this machine has {present}: "
                f"use --devices {present}, or --accelerator cpu"
            )
        if self._strategy(wanted or 1) not in RANKED or self._by_hand():
            return 1
        if wanted is None and not present:
            raise ConfigurationError(
                f"--strategy {self.strategy} has a process for each device: say how many with --devices"
            )
        return wanted or present or 1

    def over(self, own: Devices, place: Launched | None) -> Devices:
        """Returns a learner's devices, in what was said of them.

        Args:
            own: As the learner has them.
            place: This process among those that a launcher started.
        """
        count = place.count if place else self._wanted() or 1
        asked = self._spec(count)
        if self.strategy is None and self.count is None and self.ids is None and (own.ranked or count == 1):
            asked = dataclasses.replace(asked, strategy=own.strategy, count=own.count)
        return dataclasses.replace(
            asked,
            ids=self.ids or own.ids,
            threads=own.threads,
            accelerator=asked.accelerator if self.accelerator else own.accelerator,
            precision=asked.precision if self.precision else own.precision,
        )

    @property
    def of_tensorflow(self) -> bool:
        """Whether processes are TensorFlow's workers, who must be told of each other even where there is but one."""
        return self.strategy == "multiworker" and not self._by_hand()

    def _by_hand(self) -> bool:
        """Tells whether the user's ``TF_CONFIG`` says that this process is one of several."""
        return self.strategy == "multiworker" and TF_CONFIG in os.environ

    def _wanted(self) -> int | None:
        return len(self.ids) if self.count is None and self.ids else self.count

    def _strategy(self, count: int) -> str:
        return self.strategy or ("ddp" if count > 1 else "single")

    def _spec(self, count: int) -> Devices:
        return Devices(
            self._strategy(count),  # type: ignore[arg-type]  # the specification refuses what it does not know
            count=count if self.strategy not in ("dp", *OF_TENSORFLOW) or self.count else None,
            ids=self.ids,
            accelerator=self.accelerator or "auto",  # type: ignore[arg-type]
            precision=self.precision or "fp32",  # type: ignore[arg-type]
        )

    def _present(self) -> int | None:
        """Returns how many CUDA devices there are; None where the CPU is meant."""
        if self.accelerator == "cpu":
            return None
        import torch

        found = torch.cuda.device_count()
        if self.accelerator == "cuda" and not found:
            raise ConfigurationError(
                f"--accelerator cuda was asked for, but torch {torch.__version__} sees no CUDA device; "
                "use --accelerator cpu, or install a CUDA build of torch and check `shoal doctor`"
            )
        return found or None


def parse_ids(text: str | None) -> tuple[int, ...] | None:
    """Returns the numbers of ``0,1,3``; None for None.

    Raises:
        ConfigurationError: It is no such list.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(f"--ids takes numbers such as 0,1,3, not {text!r}") from error
