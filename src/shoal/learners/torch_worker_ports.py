"""Where TensorFlow's workers meet, found by those that start them: each machine finds ports, and tells the others."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from shoal.devices import WORKERS
from shoal.learners.torch_network import address_towards
from shoal.processes.ports import held_ports

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined] # no stub says it is public

    from shoal.learners.torch_launch import Nodes


@contextlib.contextmanager
def told_of_workers(processes: int, nodes: Nodes | None, patience: float) -> Iterator[None]:
    """Has ranks that are started within the context know the address of each, by the environment.

    Args:
        processes: How many there are on this machine, and on each.
        nodes: The machines, if there are several.
        patience: Seconds in which the other machines must have come.

    Raises:
        RuntimeError: They have not.
    """
    with contextlib.ExitStack() as held:
        ports = held.enter_context(held_ports(processes))
        store = None if nodes is None else _meeting_place(nodes, patience)
        workers = [f"127.0.0.1:{port}" for port in ports]
        if nodes is not None and store is not None:
            workers = _exchanged(store, nodes, ports)
        os.environ[WORKERS] = ",".join(workers)
        held.callback(os.environ.pop, WORKERS)
        yield
        del store  # the ranks' launcher has opened it too; until then the other machines must find it


def _meeting_place(nodes: Nodes, patience: float) -> Store:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, _, port = nodes.rendezvous.rpartition(":")
    return TCPStore(
        host,
        int(port),
        is_master=nodes.rank == 0,
        timeout=datetime.timedelta(seconds=patience),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _exchanged(store: Store, nodes: Nodes, ports: Sequence[int]) -> list[str]:
    """Tells the other machines this one's addresses; returns those of all, in order."""
    host, _, port = nodes.rendezvous.rpartition(":")
    own = host
    if nodes.rank:
        address = address_towards(host, int(port))
        own = f"[{address}]" if ":" in address else address
    store.set(f"shoal-workers-{nodes.rank}", ",".join(f"{own}:{one}" for one in ports))
    told = [store.get(f"shoal-workers-{rank}").decode() for rank in range(nodes.count)]
    return [address for each in told for address in each.split(",")]
