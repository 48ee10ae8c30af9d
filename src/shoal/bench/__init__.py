"""Measuring shoal on the machine at hand."""

from shoal.bench.models import MODELS
from shoal.bench.simulate import Measurement, simulate

__all__ = ["MODELS", "Measurement", "simulate"]
