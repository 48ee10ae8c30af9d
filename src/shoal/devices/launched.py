"""What a launcher has told this process: which of several it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from shoal.devices.slurm import hosts_of, ports_of, tasks_of_nodes
from shoal.errors import ConfigurationError


@dataclass(frozen=True)
class Launched:
    """This process among those that a launcher started together."""

    rank: int
    """Which one this is, over all machines."""
    count: int
    """How many there are."""
    local_rank: int
    """Which one on this machine."""
    local_count: int
    """How many on this machine."""
    address: str
    """The machine of rank 0."""
    port: int
    """Where they meet on it."""

    @classmethod
    def alone(cls) -> Self:
        """Returns the place of a process that no launcher has started."""
        return cls(rank=0, count=1, local_rank=0, local_count=1, address="", port=0)

    @classmethod
    def here(cls) -> Self | None:
        """Returns what torchrun or Slurm says of this process; None where no launcher has started several.

        Raises:
            ConfigurationError: It is incomplete.
        """
        environment = os.environ
        if "RANK" in environment and "WORLD_SIZE" in environment:
            try:
                rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
                return cls(
                    rank=rank,
                    count=count,
                    local_rank=int(environment.get("LOCAL_RANK", rank)),
                    local_count=int(environment.get("LOCAL_WORLD_SIZE", count)),
                    address=environment["MASTER_ADDR"],
                    port=int(environment["MASTER_PORT"]),
                )
            except (KeyError, ValueError) as error:
                raise ConfigurationError(
                    f"RANK is set, but the launcher's environment is incomplete: {error}"
                ) from error
        # A batch script runs as one task of its own, and starts the others with srun.
        if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environment:
            return cls._by_slurm()
        return None

    @classmethod
    def _by_slurm(cls) -> Self:
        environment = os.environ
        try:
            job = int(environment["SLURM_JOB_ID"])
            step = int(environment.get("SLURM_STEP_ID", "0"))
            return cls(
                rank=int(environment["SLURM_PROCID"]),
                count=int(environment["SLURM_NTASKS"]),
                local_rank=int(environment["SLURM_LOCALID"]),
                local_count=tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])],
                address=environment.get("MASTER_ADDR") or hosts_of(environment["SLURM_STEP_NODELIST"])[0],
                port=int(environment.get("MASTER_PORT") or ports_of(job, step)[0]),
            )
        except (LookupError, ValueError) as error:
            raise ConfigurationError(
                f"Slurm's environment is incomplete: {error}; start the ranks with srun"
            ) from error
