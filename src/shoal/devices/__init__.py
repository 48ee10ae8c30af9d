"""Which devices one learner uses, and how."""

from shoal.devices.spec import Accelerator, Devices

__all__ = ["Accelerator", "Devices"]
