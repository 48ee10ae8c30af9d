"""Sites whose ranks compute on CUDA devices."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import shoal
from shoal.errors import ConfigurationError
from support import Mlp, population

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")

SCRIPT = """
import os
import torch
import torch.distributed as dist
import shoal.client
from torch import nn

assert torch.cuda.device_count() == int(os.environ["LOCAL_WORLD_SIZE"])  # its own devices, and no other site's
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
dist.init_process_group("nccl", device_id=device)
net = nn.Linear(3, 2).to(device)
spread = nn.parallel.DistributedDataParallel(net, device_ids=[device.index])
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
inputs = torch.arange(12.0, device=device).reshape(4, 3) / 12
mine = inputs.chunk(dist.get_world_size())[dist.get_rank()]
for task in shoal.client.tasks():
    task.load(spread)
    optimizer.zero_grad()
    loss = spread(mine).pow(2).mean()
    loss.backward()
    optimizer.step()
    task.reply(params=spread.state_dict(), examples=4, metrics={"loss": loss})
dist.destroy_process_group()
"""


def ended(tmp_path, count, sites, **settings):
    script = tmp_path / "client.py"
    script.write_text(SCRIPT)
    places = [shoal.Site(f"site-{number}", devices=count) for number in range(sites)]
    net = partial(torch.nn.Linear, 3, 2)
    return shoal.Job(
        "cuda", script=script, model=net, sites=places, rounds=3, accelerator="cuda", **settings
    ).run()  # fmt: skip


def test_two_sites_share_a_device_when_they_are_told_to(tmp_path):
    alone = ended(tmp_path, 1, 1)
    both = ended(tmp_path, 1, 2, share_devices=True)
    for name, array in alone.params.items():
        torch.testing.assert_close(both.params[name], array, atol=1e-6, rtol=0)


def test_more_devices_than_there_are_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="share_devices=True"):
        ended(tmp_path, 1, torch.cuda.device_count() + 1)


@two_devices
def test_two_ranks_over_nccl_are_one_device(tmp_path):
    alone, spread = ended(tmp_path, 1, 1), ended(tmp_path, 2, 1)
    for name, array in alone.params.items():
        torch.testing.assert_close(spread.params[name], array, atol=1e-5, rtol=0)


def test_a_learner_at_a_site_is_the_sequential_engine():
    clients = population((8, 12))
    ours = partial(
        shoal.TorchLearner, Mlp, loss=F.cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), batch_size=4
    )
    cuda = shoal.Devices(accelerator="cuda")
    expected = shoal.federate(ours(devices=cuda), clients, rounds=2, engine="sequential")
    sites = [shoal.Site(f"site-{number}", devices=cuda, data=clients[number]) for number in range(2)]
    found = shoal.Job("cuda", learner=ours(), sites=sites, rounds=2, share_devices=True).run()
    for name, array in expected.params.items():
        torch.testing.assert_close(found.params[name], array.cpu(), atol=1e-5, rtol=0)
