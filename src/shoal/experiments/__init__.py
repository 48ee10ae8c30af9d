"""Experiments by name or from a file: functions that return an :class:`~shoal.Experiment`."""

from shoal.experiments.loading import BUILT_IN, build, build_training, load, load_training
from shoal.experiments.overrides import parse_settings

__all__ = ["BUILT_IN", "build", "build_training", "load", "load_training", "parse_settings"]
