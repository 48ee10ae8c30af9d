"""Sums over workers: what needs no second one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch.distributed as dist

from shoal.engines.torch_group import TorchGroup
from shoal.errors import WorkerError
from shoal.learners.torch_network import interface_of


@pytest.mark.parametrize(
    ("address", "interface"),
    [("127.0.0.1", "lo"), ("::1", "lo"), ("::1%lo", "lo"), ("192.0.2.7", None), ("2001:db8::7", None)],
)
def test_an_address_leads_to_its_interface(address, interface):
    assert interface_of(address) == interface


@pytest.fixture
def group():
    """A worker that is alone, and that sees another's end at its 50th look."""
    looks = itertools.count(1)

    def watch():
        if next(looks) == 50:
            raise WorkerError("worker 2 is gone")

    group = TorchGroup(dist.HashStore(), 0, 1, interface="lo", watch=watch)
    yield group
    group.leave()


def test_a_sum_that_fails_before_an_end_shows_is_explained_by_it(group, monkeypatch):
    def stalled(*_, **__):
        raise RuntimeError("timed out")

    monkeypatch.setattr(dist, "all_reduce", stalled)
    with pytest.raises(WorkerError, match="worker 2 is gone"):
        group.add_up([np.zeros(3)], [1.0])
