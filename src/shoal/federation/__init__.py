"""Many clients: the loop over rounds."""

from shoal.federation.callbacks import Callback, RunInfo
from shoal.federation.experiment import Experiment
from shoal.federation.job import Job
from shoal.federation.progress import Progress
from shoal.federation.result import Best, FederationResult
from shoal.federation.run import federate, run_experiment

__all__ = [
    "Best",
    "Callback",
    "Experiment",
    "FederationResult",
    "Job",
    "Progress",
    "RunInfo",
    "federate",
    "run_experiment",
]
