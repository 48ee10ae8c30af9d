"""What a job makes of its sites, before any of them is started."""

from __future__ import annotations

import shoal
from shoal.devices import Devices
from shoal.federation import job
from support import learner


def test_a_sites_processes_count_its_own_devices_from_0(monkeypatch):
    """They see no others."""
    served = []
    monkeypatch.setattr(job, "serve", lambda learner, site: served.append(learner.devices))
    for devices in ([3], [2, 3], Devices("fsdp", accelerator="cuda", ids=[1, 5], threads=2)):
        job._run_site(learner(), shoal.Site("site-1", devices=devices))
    assert served == [
        Devices(accelerator="cuda", count=1),
        Devices("ddp", accelerator="cuda", count=2),
        Devices("fsdp", accelerator="cuda", threads=2),
    ]
