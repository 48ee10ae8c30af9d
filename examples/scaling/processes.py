"""What processes take of the machine's memory, and of the GPU's."""

import shutil
import subprocess
from pathlib import Path


def host_memory(*pids: int) -> int:
    """Returns what processes and all their children have in memory, in bytes.

    What they share, with each other or with anybody else, counts once, as much as the largest of them has of it.
    """
    private, shared = 0, [0]
    for one in (one for pid in pids for one in (pid, *descendants(pid))):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has just ended
            continue
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        private += sizes["Private_Clean"] + sizes["Private_Dirty"]
        shared.append(sizes["Shared_Clean"] + sizes["Shared_Dirty"])
    return private + max(shared)


def descendants(pid: int) -> list[int]:
    """Returns the children of a process, and theirs."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in listed.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def device_memory() -> int:
    """Returns what is taken of all GPUs together, in bytes; 0 where there is none."""
    if shutil.which("nvidia-smi") is None:
        return 0
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    listed = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False).stdout.split()
    return sum(int(number) * 2**20 for number in listed if number.isdigit())
