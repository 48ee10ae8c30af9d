"""Workers on two hosts, whose link can be cut."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from hosts import LINK, NEEDED, ip
from launches import (
    LONG,
    QUICK,
    SOON,
    TESTS,
    Launch,
    assert_same,
    fault,
    federate,
    free_port,
    one_process,
    said,
    wait_for,
    wait_for_lines,
)

pytestmark = [pytest.mark.slow, *NEEDED]

PROMISED = 30.0
"""Seconds in which all have ended after one has."""


class Torchrun:
    """torchrun on each host, with one worker."""

    def __init__(self, nursery, hosts, folder, *options, arguments=()):
        port = free_port()
        self.agents = []
        for rank, host in enumerate(hosts):
            place = folder / host.name
            place.mkdir()
            words = ["--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", f"--master-addr={hosts[0].address}"]
            words += [f"--master-port={port}", *options, "-m", "shoal", *federate(Path(), *arguments)]
            self.agents.append(
                nursery.start(
                    "torch.distributed.run:main", output=place / "said", arguments=words, cwd=place, host=host.name,
                    environment={"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
                )
            )  # fmt: skip
        self.runs = [folder / host.name / "run" for host in hosts]

    def codes(self, seconds=60):
        """Waits for all; returns their exit codes."""
        return [agent.wait(seconds) for agent in self.agents]

    @property
    def told(self):
        """What each host has shown."""
        return [agent.told for agent in self.agents]


def worker(rank, pid, host):
    """Returns what messages call a worker."""
    return f"worker {rank} (process {pid} on {host.name})"


class TestTheSameRun:
    def test_torchrun_on_two_hosts_ends_where_one_process_does(self, nursery, alone, hosts, tmp_path):
        launch = Torchrun(nursery, hosts, tmp_path)
        assert launch.codes() == [0, 0], launch.told
        assert_same(launch.runs[0], alone, atol=1e-6)
        assert "engine distributed: 2 workers, each with engine sequential" in launch.told[0]
        assert "round" not in launch.told[1]
        assert not launch.runs[1].exists()

    def test_several_workers_of_each_host_do(self, nursery, alone, hosts, tmp_path):
        one, two = hosts
        # Many systems let a machine's own name mean 127.0.1.1, on that machine alone.
        masters = ["127.0.1.1", "127.0.1.1", one.address, one.address]
        launch = Launch(nursery, tmp_path, federate(tmp_path), workers=4, hosts=[one, one, two, two], masters=masters)
        assert launch.codes() == [0] * 4, launch.told
        assert_same(tmp_path / "run", alone, atol=1e-6)
        assert said(launch)[1:] == [[], [], []]

    @pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
    def test_they_do_over_ipv6(self, nursery, alone, hosts, tmp_path):
        for end, host in enumerate(hosts, 1):
            ip("-n", host.name, "address", "replace", f"fd00:83::{end}/64", "dev", LINK, "nodad")
        launch = Launch(nursery, tmp_path, federate(tmp_path), hosts=hosts, masters=["fd00:83::1"] * 2)
        assert launch.codes() == [0, 0], launch.told
        assert_same(tmp_path / "run", alone, atol=1e-6)

    def test_torchrun_starts_both_hosts_again_when_a_worker_dies(self, nursery, alone, hosts, tmp_path):
        launch = Torchrun(nursery, hosts, tmp_path, "--max-restarts=1", arguments=LONG)
        wait_for_lines(launch.runs[0], 2)
        os.kill(hosts[1].worker(), signal.SIGKILL)
        assert launch.codes() == [0, 0], launch.told
        assert_same(launch.runs[0], alone, atol=1e-6)


class TestEnds:
    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_host_that_dies_is_named_and_the_run_goes_on_later(self, nursery, alone, hosts, tmp_path, lost):
        launch = Torchrun(nursery, hosts, tmp_path, arguments=LONG)
        wait_for_lines(launch.runs[0], 2)
        pid = hosts[lost].worker()
        hosts[lost].kill()
        assert launch.agents[1 - lost].wait(PROMISED) == 1
        expected = f"shoal: error: {worker(lost, pid, hosts[lost])} is gone: its process or its machine has ended"
        assert launch.told[1 - lost].count(expected) == 1, launch.told
        again = Launch(nursery, tmp_path, federate(launch.runs[0].parent, "--resume"), hosts=hosts)
        assert again.codes() == [0, 0], again.told
        assert_same(launch.runs[0], alone, atol=1e-6)

    def test_what_a_client_raises_on_the_other_host_is_told_with_its_traceback(self, nursery, hosts, tmp_path):
        broken = fault("a client", 1, "raise")
        launch = Launch(nursery, tmp_path, federate(tmp_path), hosts=hosts, fault=broken)
        assert launch.codes(PROMISED) == [1, 1], launch.told
        assert said(launch)[1] == []
        failed = re.escape(f"{worker(1, launch.children[1].pid, hosts[1])} failed: ")
        assert re.search(f"^shoal: error: {failed}client . failed in round 1: ZeroDivisionError", launch.told[0], re.M)
        assert 'federations.py", line' in launch.told[0]


class TestACutLink:
    def test_both_hosts_end_in_the_promised_time(self, nursery, alone, hosts, tmp_path):
        launch = Torchrun(nursery, hosts, tmp_path, arguments=("--set", "pause=0.1"))
        wait_for_lines(launch.runs[0], 1)
        pids = [host.worker() for host in hosts]
        cut = time.monotonic()
        hosts[1].switch("down")
        assert launch.codes(cut + PROMISED - time.monotonic()) == [1, 1], launch.told
        for rank, told in enumerate(launch.told):
            other = worker(1 - rank, pids[1 - rank], hosts[1 - rank])
            assert f"shoal: error: {other} is gone: no sign of life for 15 seconds" in told
        assert one_process(nursery, launch.runs[0].parent, "--resume")[0] == 0
        assert_same(launch.runs[0], alone, atol=1e-6)

    @pytest.mark.parametrize(("busy", "place"), [(0, "training"), (1, "training"), (1, "the sum")])
    def test_so_do_those_in_the_middle_of_something_long(self, nursery, alone, hosts, tmp_path, busy, place):
        stuck = fault(place, busy, 60.0)
        launch = Launch(nursery, tmp_path, federate(tmp_path), hosts=hosts, settings=QUICK, fault=stuck)
        wait_for((tmp_path / "run/config.json").exists)
        time.sleep(1.5)
        hosts[busy].switch("down")
        assert launch.codes(SOON) == [1, 1], launch.told
        for rank, lines in enumerate(said(launch)):
            other = worker(1 - rank, launch.children[1 - rank].pid, hosts[1 - rank])
            assert lines == [f"{other} is gone: no sign of life for 2 seconds"]
        assert one_process(nursery, tmp_path, "--resume")[0] == 0
        assert_same(tmp_path / "run", alone, atol=1e-6)
