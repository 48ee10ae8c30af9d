"""Which of this machine's devices each site has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.devices import THREADS, Accelerator, cores_each
from shoal.errors import ConfigurationError
from shoal.sites.spec import Site

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """Divides the devices among the sites."""

    accelerator: Accelerator = "auto"
    """Of sites that do not say it themselves: ``cpu``, ``cuda``, or ``auto`` for CUDA where there are devices."""
    share_devices: bool = False
    """Whether sites may use the same CUDA device."""

    def environments(self, sites: Sequence[Site]) -> list[dict[str, str]]:
        """Returns the environment variables with which each site sees its own devices alone.

        Raises:
            ConfigurationError: There are too few devices, or two sites name the same.
        """
        present = _cuda_devices() if any(self._wants_cuda(site) for site in sites) else []
        taken: dict[str, str] = {}
        own: dict[str, list[str]] = {}
        for site in sorted(sites, key=lambda site: site.spread.ids is None):  # those that say which ones come first
            if self._wants_cuda(site) and (present or self._of(site) == "cuda"):
                own[site.name] = self._devices(site, present, taken)
        found = []
        threads = str(cores_each(sum(site.ranks for site in sites)))
        for site in sites:
            env = {name: os.environ.get(name, threads) for name in THREADS}
            env[VISIBLE] = ",".join(own.get(site.name, ()))  # none, too, where torch sees none: another framework may
            found.append(env)
        return found

    def _of(self, site: Site) -> Accelerator:
        own = site.spread.accelerator
        return self.accelerator if own == "auto" else own

    def _wants_cuda(self, site: Site) -> bool:
        return self._of(site) != "cpu"

    def _devices(self, site: Site, present: Sequence[str], taken: dict[str, str]) -> list[str]:
        """Returns what the site's processes may see, and notes whose that is."""
        ids = site.spread.ids
        if ids is not None:
            if max(ids) >= len(present):
                raise ConfigurationError(
                    f"{site.name} names CUDA device {max(ids)}, and this machine has {len(present)}"
                )
            own = [present[index] for index in ids]
        else:
            free = [device for device in present if device not in taken]
            wanted = site.spread.count or site.ranks
            own = free[:wanted]
            if self.share_devices and len(own) < wanted:
                own = list(present[:wanted])
            if len(own) < wanted:
                raise ConfigurationError(
                    f"{site.name} wants {wanted} CUDA devices, and of {len(present)} on this machine "
                    f"{len(free)} are free: use fewer, share_devices=True, or accelerator='cpu'"
                )
        for device in own:
            other = taken.setdefault(device, site.name)
            if other != site.name and not self.share_devices:
                raise ConfigurationError(
                    f"{site.name} and {other} both have CUDA device {device}: "
                    "give them others, or say share_devices=True"
                )
        return own


def _cuda_devices() -> list[str]:
    """Returns what this process may see of this machine's CUDA devices, without touching them."""
    import torch

    count = torch.cuda.device_count()
    visible = [part.strip() for part in os.environ.get(VISIBLE, "").split(",") if part.strip()]
    return visible[:count] if len(visible) >= count > 0 else [str(index) for index in range(count)]
