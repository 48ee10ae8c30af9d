"""Which devices one learner uses, and how."""

from shoal.devices.cores import THREADS, cores_each
from shoal.devices.launched import Launched
from shoal.devices.slurm import slurm_workers
from shoal.devices.spec import OF_TENSORFLOW, Accelerator, Devices, Precision, Strategy
from shoal.devices.tensorflow_workers import REUSE_PORT, TF_CONFIG, WORKERS, tensorflow_config

__all__ = [
    "OF_TENSORFLOW",
    "REUSE_PORT",
    "TF_CONFIG",
    "THREADS",
    "WORKERS",
    "Accelerator",
    "Devices",
    "Launched",
    "Precision",
    "Strategy",
    "cores_each",
    "slurm_workers",
    "tensorflow_config",
]
