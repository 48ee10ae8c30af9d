"""Settings that hold for all tests."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# Tests that run side by side have a core each: torch's threads would wait for those of the others.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Modules beside the tests whose assertions are to be told in full.
pytest.register_assert_rewrite("launches", "pictures", "site_jobs")

# The machine's speed is no property of the code.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")

# What a shell starts in the background is deaf to SIGINT, and so would be all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def handlers_of_signals():
    """A command that a test runs in this process leaves its own handlers behind, which the next test must not meet."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keeps tests together that share what a fixture makes for their whole module, so that it is made once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None and _shares(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def _shares(item):
    """Tells whether a test asks, itself or through its fixtures, for one that lives as long as the module."""
    definitions = item._fixtureinfo.name2fixturedefs
    names, seen = list(item._fixtureinfo.argnames), set()
    while names:
        name = names.pop()
        if name in seen or name not in definitions:
            continue
        seen.add(name)
        last = definitions[name][-1]
        if last.scope == "module":
            return True
        names += last.argnames
    return False
