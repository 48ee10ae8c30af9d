"""One site: the loop over the steps of a training."""

from shoal.training.callbacks import Progressed, TrainingCallback, TrainingInfo
from shoal.training.definition import Training
from shoal.training.progress import TrainingProgress
from shoal.training.result import BestEpoch, ClassReport, TrainingResult
from shoal.training.run import run_training, train

__all__ = [
    "BestEpoch",
    "ClassReport",
    "Progressed",
    "Training",
    "TrainingCallback",
    "TrainingInfo",
    "TrainingProgress",
    "TrainingResult",
    "run_training",
    "train",
]
