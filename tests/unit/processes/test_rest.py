from __future__ import annotations

import os
import socket
import subprocess
import sys

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from shoal.processes.rest import rest_at_exit

sys.setswitchinterval(100)  # a thread that wants Python's lock does not get it before Python ends
rest_at_exit()
dist.init_process_group("gloo")
kept = dist.group.WORLD  # as DistributedDataParallel does
for _ in range(200):
    dist.all_reduce(torch.ones(8))
"""


def test_ranks_whose_groups_are_still_there_end_well(tmp_path):
    """Without the rest, five of eight such pairs are aborted."""
    pairs = [_pair() for _ in range(4)]
    for pair in pairs:
        for process in pair:
            told = process.communicate(timeout=60)[0]
            assert process.returncode == 0, told


def _pair() -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
