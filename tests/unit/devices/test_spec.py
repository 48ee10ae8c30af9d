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
        (lambda: Devices(accelerator="cpu", id=0), "device id 0 was asked for with accelerator 'cpu'"),
        (lambda: Devices(accelerator="cuda", id=-1), "device id -1"),
        (lambda: Devices(threads=0), "threads must be ≥ 1, not 0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("devices", [Devices(accelerator="cuda"), Devices(id=0)])
def test_cuda_is_never_replaced_by_the_cpu(devices):
    with pytest.raises(ConfigurationError, match="sees none; use accelerator='cpu'"):
        resolve(devices)
