"""What the tests of several workers share."""

from __future__ import annotations

import subprocess

import pytest

from hosts import linked_hosts, why_not
from launches import one_process, wait_for
from nursery import Nursery


@pytest.fixture(scope="session")
def nursery():
    """Starts processes; ends those that are left at last."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def forked(nursery, tmp_path_factory):
    """Runs a function as a command that has everything imported when it starts; returns what came of it."""

    def run(function, *arguments, cwd, **environment):
        folder = tmp_path_factory.mktemp("forked")
        child = nursery.start(
            function, output=folder / "output", errors=folder / "errors", arguments=arguments, cwd=cwd,
            environment=environment,
        )  # fmt: skip
        code = child.wait(120)
        said = [(folder / stream).read_text() for stream in ("output", "errors")]
        return subprocess.CompletedProcess([function, *arguments], code, *said)

    return run


@pytest.fixture(scope="session")
def alone(nursery, tmp_path_factory):
    """The run of one process without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    code, told = one_process(nursery, folder)
    assert code == 0, told
    return folder / "run"


@pytest.fixture(scope="module")
def machines():
    """Two hosts, where this machine can be made to be two."""
    if refused := why_not():
        pytest.skip(f"no linked network namespaces can be made here: {refused}")
    with linked_hosts() as hosts:
        yield hosts


@pytest.fixture
def hosts(machines):
    """Two hosts on which nothing runs, linked."""
    yield machines
    left = [host.processes for host in machines]
    for host in machines:
        host.kill()
        host.switch("up")
    wait_for(lambda: not any(host.processes for host in machines))
    assert left == [[], []]
