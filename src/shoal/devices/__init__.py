"""Which devices one learner uses, and how."""

from shoal.devices.spec import Accelerator, Devices, Precision

__all__ = ["Accelerator", "Devices", "Precision"]
