"""What holds for all tests that compute with TensorFlow in this process."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def logical_devices():
    """Makes as many as any of the tests wants, before TensorFlow starts with one."""
    pytest.importorskip("tensorflow")
    from shoal.devices import Devices
    from shoal.learners.keras_devices import strategy_of

    strategy_of(Devices("mirrored", count=3, accelerator="cpu"))


@pytest.fixture(scope="session")
def reference():
    """What torch learners make of the same."""
    import keras_reference

    return keras_reference.computed()
