"""Which devices one learner uses, and how."""

from shoal.devices.cores import cores_each
from shoal.devices.launched import Launched
from shoal.devices.spec import Accelerator, Devices, Precision, Strategy

__all__ = ["Accelerator", "Devices", "Launched", "Precision", "Strategy", "cores_each"]
