"""Settings that hold for all tests."""

from __future__ import annotations

from hypothesis import settings

# The machine's speed is no property of the code.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")
