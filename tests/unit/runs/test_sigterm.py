from __future__ import annotations

import os
import signal

import pytest

from shoal.errors import Terminated
from shoal.runs import sigterm_raised


@pytest.fixture
def unhandled():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_it_ends_the_block_and_is_the_systems_again_after_it(unhandled):
    with pytest.raises(Terminated), sigterm_raised():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_of_the_users_own_stays():
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try:
        with sigterm_raised():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [1]
