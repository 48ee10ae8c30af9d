"""What a run leaves on disk: its folder, metrics, checkpoints, report, and what trackers are given."""

from shoal.runs.checkpoints import Checkpoint, Checkpoints, save_model
from shoal.runs.files import write_json
from shoal.runs.folder import RunData, RunFolder, is_run, read_run
from shoal.runs.interrupts import deferred, sigterm_raised
from shoal.runs.metrics import TIME_KEYS, USAGE_KEYS, MetricsLog, read_metrics
from shoal.runs.report import report_on, write_report
from shoal.runs.selection import Choice, Criteria, Selection
from shoal.runs.trackers import TRACKERS, TensorBoardTracker, check_trackers, require_tensorboard, require_trackers
from shoal.runs.writer import RunWriter, environment

__all__ = [
    "TIME_KEYS",
    "TRACKERS",
    "USAGE_KEYS",
    "Checkpoint",
    "Checkpoints",
    "Choice",
    "Criteria",
    "MetricsLog",
    "RunData",
    "RunFolder",
    "RunWriter",
    "Selection",
    "TensorBoardTracker",
    "check_trackers",
    "deferred",
    "environment",
    "is_run",
    "read_metrics",
    "read_run",
    "report_on",
    "require_tensorboard",
    "require_trackers",
    "save_model",
    "sigterm_raised",
    "write_json",
    "write_report",
]
