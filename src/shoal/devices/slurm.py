"""What Slurm says of the tasks of a job's step, and where they meet."""

from __future__ import annotations

import os
import re

from shoal.errors import ConfigurationError

PORTS = range(15000, 35000)
"""Where the processes of a Slurm job meet: at ports of the job's own, below those that the system gives away."""

PORTS_EACH = 17
"""Ports of a step on each machine: one where all meet, and one for each of TensorFlow's workers there."""


def slurm_workers() -> list[str] | None:
    """Returns an address for each task of this Slurm step, by rank, all tasks the same; None outside of a step.

    Raises:
        ConfigurationError: Slurm's environment is incomplete, or the tasks are dealt out in a way that has no ports.
    """
    environment = os.environ
    if "SLURM_STEP_NODELIST" not in environment:
        return None
    try:
        ports = ports_of(int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0")))[1:]
        counts = tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])
        hosts = hosts_of(environment["SLURM_STEP_NODELIST"])
        place = int(environment["SLURM_NODEID"]), int(environment["SLURM_LOCALID"])
        in_order = sum(counts[: place[0]]) + place[1] == int(environment["SLURM_PROCID"])
    except (LookupError, ValueError) as error:
        raise ConfigurationError(f"Slurm's environment is incomplete: {error}; start the ranks with srun") from error
    if max(counts) > len(ports) or not in_order:
        raise ConfigurationError(
            f"TensorFlow's workers have at most {len(ports)} tasks on a machine, dealt out machine by machine: "
            "srun --distribution=block"
        )
    return [f"{host}:{port}" for host, count in zip(hosts, counts, strict=True) for port in ports[:count]]


def ports_of(job: int, step: int) -> range:
    """Returns the ports of a Slurm job's step, which are other than those of the jobs before and after."""
    slots = len(PORTS) // PORTS_EACH
    first = PORTS.start + (job * 7 + step) % slots * PORTS_EACH
    return range(first, first + PORTS_EACH)


def hosts_of(nodes: str) -> list[str]:
    """Returns the hosts of Slurm's short form: ``gpu[07-08,12],cpu1`` is gpu07, gpu08, gpu12, cpu1."""
    found = []
    for entry in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes):
        names = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\]]+)\]", entry):
            names = [name + part for name in names for part in ([text] if text else _numbers(ranges))]
        found += names
    if not found:
        raise ValueError(f"no host in {nodes!r}")
    return found


def _numbers(ranges: str) -> list[str]:
    """Returns the numbers of ``07-09,12``, as they are written: 07, 08, 09, 12."""
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return found


def tasks_of_nodes(counts: str) -> list[int]:
    """Returns the nodes' numbers of tasks from Slurm's short form: ``2(x3),1`` is 2, 2, 2, 1."""
    each: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"no number of tasks in {part!r}")
        each += [int(found[1])] * int(found[2] or 1)
    return each
