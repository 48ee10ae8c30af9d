"""Measuring shoal on the machine at hand."""

from shoal.bench.devices import DeviceTables, measure_devices
from shoal.bench.models import MODELS
from shoal.bench.simulate import Measurement, simulate

__all__ = ["MODELS", "DeviceTables", "Measurement", "measure_devices", "simulate"]
