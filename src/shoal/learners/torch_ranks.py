"""The processes that train one model together, a device each."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined] # no stub says they are public
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from shoal.devices import Devices, Launched
from shoal.errors import ConfigurationError, WorkerError
from shoal.learners.torch_devices import resolve
from shoal.learners.torch_network import gloo_over, interface_towards
from shoal.processes.rest import rest_at_exit

PATIENCE = datetime.timedelta(minutes=10)
"""How long a rank waits for the others at one point: longer than rank 0 takes to write a large model."""

EXCHANGES = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out waiting")
"""What is in the messages of torch's errors that come from other ranks."""


_trainings = count()
"""Numbers this process's trainings; all ranks run the same ones in one order."""


class Ranks:
    """All ranks, as one of them sees them.

    Args:
        rank: Which one this is.
        count: How many there are.
        device: Where this one computes.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.count = count
        self.device = device or torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.rank == 0

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Returns the numbers of every rank, in the order of the ranks; each gives as many.

        Raises:
            WorkerError: A rank is gone.
        """
        if self.count == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        every = list(own.new_empty(self.count, len(own)))
        with explained():
            dist.all_gather(every, own)
        return torch.stack(every).tolist()

    def from_leader(self, numbers: Sequence[float]) -> list[float]:
        """Returns the numbers of rank 0; each rank gives as many, and those of the others do not count.

        Raises:
            WorkerError: A rank is gone.
        """
        if self.count == 1:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with explained():
            dist.broadcast(own, 0)
        return own.tolist()

    def share(
        self, tensors: Mapping[str, Tensor] | None, meta: Mapping[str, Any] | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what rank 0 gives, on the CPU; the others give None.

        Args:
            tensors: A flat tree.
            meta: JSON.

        Raises:
            WorkerError: A rank is gone.
        """
        if self.count == 1:
            return dict(tensors or {}), dict(meta or {})
        own = tensors or {}
        rows = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in own.items()]
        leader = json.loads(self._text(json.dumps({"rows": rows, "meta": meta})))
        found = {}
        for name, dtype, shape in leader["rows"]:
            mine = own[name] if name in own else torch.empty(shape, dtype=getattr(torch, dtype))
            found[name] = self._from_leader(mine)
        return found, leader["meta"]

    def _text(self, text: str) -> str:
        """Returns rank 0's text."""
        raw = text.encode()
        [length] = self.from_leader([len(raw)])
        own = np.frombuffer(raw.ljust(int(length))[: int(length)], dtype=np.uint8).copy()
        return self._from_leader(torch.from_numpy(own)).numpy().tobytes().decode()

    def _from_leader(self, tensor: Tensor) -> Tensor:
        """Returns rank 0's tensor of this shape and dtype, on the CPU."""
        sent = tensor.detach().to(self.device).contiguous()
        with explained():
            dist.broadcast(sent.view(-1).view(torch.uint8) if sent.numel() else sent, 0)
        return sent.cpu()

    @torch.no_grad()
    def align(self, tensor: Tensor) -> None:
        """Copies rank 0's tensor to every rank's.

        Raises:
            WorkerError: A rank is gone.
        """
        tensor.copy_(self._from_leader(tensor))


@contextmanager
def joined(devices: Devices) -> Iterator[Ranks]:
    """Joins the ranks that a launcher has started for a learner's devices, for as long as the context lasts.

    Raises:
        ConfigurationError: No launcher has started any, or another number; or their backend cannot be.
        WorkerError: The others did not come.
    """
    place = Launched.here()
    if not devices.ranked:
        if place is not None and place.count > 1:
            raise ConfigurationError(
                f"{place.count} processes were started, and strategy {devices.strategy!r} has one: "
                "use Devices('ddp') or Devices('fsdp'), or start one process"
            )
        yield Ranks(device=resolve(devices))
        return
    _check_count(devices, place)
    place = place or Launched.alone()  # one device: a group of one, so that the strategy is what was asked for
    device = resolve(devices)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own = not dist.is_initialized()
    if own:
        _begin(place, device)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()


def _check_count(devices: Devices, place: Launched | None) -> None:
    started = place.count if place else 1
    if devices.count not in {None, started}:
        fix = f"start it with `torchrun --nproc_per_node={devices.count}`, or `shoal train … --devices {devices.count}`"
        what = f"{started} were started" if place else "no launcher has started any"
        raise ConfigurationError(
            f"strategy {devices.strategy!r} on {devices.count} devices needs as many processes, and {what}: {fix}"
        )
    if not dist.is_available():
        raise ConfigurationError(f"torch {torch.__version__} was built without torch.distributed: use another build")


def _begin(place: Launched, device: torch.device) -> None:
    """Starts the default process group."""
    rest_at_exit()
    backend = "gloo"
    if device.type == "cuda":
        if not dist.is_nccl_available():
            raise ConfigurationError("torch was built without NCCL, which CUDA devices need: use accelerator='cpu'")
        backend = "cpu:gloo,cuda:nccl"
    if place.count == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=PATIENCE)
        return
    try:
        with gloo_over(interface_towards(place.address, place.port)):
            dist.init_process_group(
                backend,
                store=_meeting_place(place),
                rank=place.rank,
                world_size=place.count,
                timeout=PATIENCE,
                device_id=device if device.type == "cuda" else None,
            )
            dist.all_reduce(torch.zeros(1))  # or a rank that refuses what is asked for may be gone while another joins
    except (RuntimeError, ValueError) as error:
        raise WorkerError(
            f"the {place.count} ranks did not meet at {place.address}:{place.port}: {str(error).splitlines()[0]}"
        ) from error


def _meeting_place(place: Launched) -> Store:
    """Returns the store in which the ranks find each other for one training.

    It stays from one training to the next, because a rank may begin that while another still ends the last; and each
    has a part of its own there, as it has after torchrun has started the ranks again.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"shoal-training-{restart}-{next(_trainings)}", _kept_store(place))


@cache
def _kept_store(place: Launched) -> Store:
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun itself does
    return TCPStore(
        place.address, place.port, is_master=keeps, timeout=PATIENCE, wait_for_workers=False, multi_tenant=keeps
    )


@contextmanager
def explained() -> Iterator[None]:
    """Raises what ends an exchange between ranks as what it is; other errors pass.

    Raises:
        WorkerError: Another rank is gone, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(mark in text for mark in EXCHANGES):
            raise
        raise WorkerError(f"another rank is gone, or did not answer in time: {text.splitlines()[0]}") from error
