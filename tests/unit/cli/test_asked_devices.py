"""What ``shoal train`` makes of the devices that it was told."""

from __future__ import annotations

import pytest

from shoal.cli.devices import AskedDevices
from shoal.devices import TF_CONFIG, Devices, Launched
from shoal.errors import ConfigurationError

PLACE = Launched(rank=1, count=4, local_rank=1, local_count=2, address="a", port=1)


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    """Has torch see no CUDA device, and no TF_CONFIG."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv(TF_CONFIG, raising=False)


def asked(**told):
    return AskedDevices(**{name: told.get(name) for name in ("count", "strategy", "ids", "accelerator", "precision")})


PROCESSES = {
    "nothing": ({}, 1),
    "several": ({"count": 3}, 3),
    "mirrored": ({"strategy": "mirrored", "count": 3}, 1),
    "mirrored on GPUs that torch does not see": ({"strategy": "mirrored", "count": 2, "accelerator": "cuda"}, 1),
    "multiworker": ({"strategy": "multiworker", "count": 3}, 3),
    "multiworker by ids": ({"strategy": "multiworker", "ids": (0, 2), "accelerator": "cuda"}, 2),
}


@pytest.mark.parametrize("kind", PROCESSES)
def test_strategies_have_the_processes_that_they_need(kind):
    told, expected = PROCESSES[kind]
    assert asked(**told).processes() == expected


def test_ranks_without_a_number_are_refused():
    for strategy in ("ddp", "multiworker"):
        with pytest.raises(ConfigurationError, match="has a process for each device: say how many with --devices"):
            asked(strategy=strategy).processes()


def test_tf_config_says_that_this_process_is_one_of_several(monkeypatch):
    monkeypatch.setenv(TF_CONFIG, "{}")
    told = asked(strategy="multiworker")
    assert told.processes() == 1
    assert told.over(Devices(), None) == Devices("multiworker")
    assert asked(strategy="multiworker", count=4).processes() == 1
    assert asked(strategy="multiworker", count=4).over(Devices(), None) == Devices("multiworker", count=4)
    assert asked(count=2).processes() == 2


def test_a_launchers_ranks_are_the_devices():
    assert asked(strategy="multiworker", count=2).over(Devices(), PLACE) == Devices("multiworker", count=4)
    own = Devices("multiworker", count=4, threads=1)
    assert asked().over(own, PLACE) == own
