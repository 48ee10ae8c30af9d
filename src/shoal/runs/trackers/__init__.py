"""Where metrics go beside ``metrics.jsonl``: TensorBoard's events, MLflow, Weights & Biases.

Events are written by the run itself. MLflow and Weights & Biases bring threads, hooks at exit, and waits for servers,
none of which a run should have in its own process: each follows ``metrics.jsonl`` from a process beside it.
"""

from shoal.runs.trackers.choice import TRACKERS, check_trackers, require_trackers
from shoal.runs.trackers.process import Ending, TrackerProcess
from shoal.runs.trackers.tensorboard import TensorBoardTracker, require_tensorboard

__all__ = [
    "TRACKERS",
    "Ending",
    "TensorBoardTracker",
    "TrackerProcess",
    "check_trackers",
    "require_tensorboard",
    "require_trackers",
]
