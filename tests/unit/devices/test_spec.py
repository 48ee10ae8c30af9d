from __future__ import annotations

import pytest
import torch

from shoal import Devices
from shoal.errors import ConfigurationError
from shoal.learners.torch_devices import resolve


def test_the_cpu_is_found():
    assert resolve(Devices("single", accelerator="cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Devices("singel"), "unknown strategy 'singel'; did you mean 'single'"),
        (lambda: Devices(accelerator="gpu"), "unknown accelerator 'gpu'; did you mean 'cpu'"),
        (lambda: Devices(accelerator="cpu", ids=[0]), r"device ids \[0\] were asked for with accelerator 'cpu'"),
        (lambda: Devices(accelerator="cuda", ids=[-1]), r"device ids \[-1\]"),
        (lambda: Devices("ddp", accelerator="cuda", ids=[1, 1]), "name a device twice"),
        (lambda: Devices(count=2), "'single' uses one device, not 2: use 'ddp'"),
        (lambda: Devices(ids=[0, 1]), "'single' uses one device"),
        (lambda: Devices("ddp", count=0), "must be ≥ 1, not 0"),
        (lambda: Devices("dp", accelerator="cpu"), "on a CPU use 'ddp'"),
        (lambda: Devices("dp", count=3, ids=[0, 1]), "3 devices were asked for and 2 named"),
        (lambda: Devices(threads=0), "threads must be ≥ 1, not 0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("devices", [Devices(accelerator="cuda"), Devices(ids=[0])])
def test_cuda_is_never_replaced_by_the_cpu(devices):
    with pytest.raises(ConfigurationError, match="sees none; use accelerator='cpu'"):
        resolve(devices)
