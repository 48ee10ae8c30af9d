"""What the tests of several workers share."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("launches")

from launches import one_process  # noqa: E402 - its assertions are to be rewritten
from nursery import Nursery  # noqa: E402


@pytest.fixture(scope="session")
def nursery():
    """Starts processes; ends those that are left at last."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def alone(nursery, tmp_path_factory):
    """The run of one process without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    code, told = one_process(nursery, folder)
    assert code == 0, told
    return folder / "run"
