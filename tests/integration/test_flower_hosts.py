"""Real sites on hosts of their own, over Flower: a site's link goes down in a round and comes back later."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("flwr")

from engine_experiment import SITES, expected_weights
from engine_runs import FILE, Run
from hosts import NEEDED, star_of_hosts, why_not
from process_table import eventually
from shoal.deploy.certificates import write_node_key, write_server_certificates
from shoal.deploy.flower_app import write_app
from shoal.deploy.flower_tools import CONNECTION, HOME, environment, tool
from shoal.deploy.private_site import write_site
from shoal.deploy.site_settings import Allowed
from shoal.deploy.started import MARK, StartedProcesses
from shoal.processes.table import marked

pytestmark = [
    *NEEDED,
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.xdist_group("flower"),
    # What is started for a folder is meant to live on.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

PORT = 8000

SUBMIT = """
import sys
from pathlib import Path
from shoal.deploy.flower_submit import submit
submit(Path(sys.argv[1]), Path(sys.argv[2]), connection="shoal", show=lambda line: print(line, flush=True), within=400)
"""


class Federation:
    """A SuperLink on one host and a site on each of two others, of which nothing is left at the end.

    Args:
        folder: For all files.
        server: The host of the SuperLink.
        leaves: The other hosts, each with the address under which it knows the server.
    """

    def __init__(self, folder, server, leaves):
        self.folder, self.server = folder, server
        self.leaves = dict(zip(SITES, leaves, strict=True))
        self.started = StartedProcesses(folder)
        self.env = environment(folder / HOME) | {"OMP_NUM_THREADS": "1"}

    def start(self):
        """Starts everything."""
        names = ["127.0.0.1", "localhost", *(address for _, address in self.leaves.values())]
        made = write_server_certificates(self.folder / "certificates", names)
        (self.folder / HOME).mkdir()
        (self.folder / HOME / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{PORT}"\nroot-certificates = "{made.authority}"\n'
        )
        self.on(
            *(self.server, "superlink", tool("flower-superlink"), "--host", "0.0.0.0", "--port", PORT),
            *("--database", self.folder / "state.db", "--enable-supernode-auth"),
            *("--disable-runtime-dependency-installation", "--ssl-ca-certfile", made.authority),
            *("--ssl-certfile", made.certificate, "--ssl-keyfile", made.key),
        )
        allowed = [Allowed(name="two", source=str(FILE), settings=("*",))]
        for name, (host, address) in self.leaves.items():
            site = self.folder / "sites" / name
            self.on(host, name, *write_site(site, name, allowed))
            key = write_node_key(self.folder / "keys", name)
            assert eventually(lambda key=key: self.flwr("supernode", "register", f"{key}.pub", CONNECTION), 90)
            self.on(
                *(host, f"supernode-{name}", sys.executable, "-m", "shoal", "supernode", site),
                *("--superlink", f"{address}:{PORT}", "--port", 9094),
                *("--root-certificates", made.authority, "--auth-supernode-private-key", key),
            )

    def on(self, host, name, *command):
        """Starts a process on a host."""
        words = ["ip", "netns", "exec", host.name, *map(str, command)]
        self.started.start(name, words, env=self.env, cwd=self.folder)

    def flwr(self, *words):
        """Runs a command of Flower's on the server; returns whether it succeeded."""
        command = ["ip", "netns", "exec", self.server.name, tool("flwr"), *words]
        done = subprocess.run(command, env=self.env, capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    def submit(self, order, scratch, show):
        """Runs an order to its end."""
        write_app(scratch, order=order.to_json(), name="two", files={})
        command = ["ip", "netns", "exec", self.server.name, sys.executable, "-c", SUBMIT, self.folder, scratch]
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path]))
        done = subprocess.run(
            [*map(str, command)], env=self.env | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=450,
            check=False,
        )  # fmt: skip
        for line in done.stdout.splitlines():
            show(line)
        assert done.returncode == 0, done.stdout + done.stderr

    def end(self):
        """Ends everything."""
        self.started.stop(within=10)
        assert marked(MARK, str(self.folder)) == []


@pytest.fixture
def federation(tmp_path):
    if reason := why_not():
        pytest.skip(f"this machine makes no hosts: {reason}")
    with star_of_hosts() as (server, leaves), contextlib.ExitStack() as stack:
        made = Federation(tmp_path, server, leaves)
        stack.callback(made.end)
        made.start()
        yield made


def test_a_site_whose_link_goes_down_is_left_out_and_takes_part_again(federation, tmp_path):
    run = Run(federation.submit, tmp_path, rounds=10, pause=3.0, min_sites=1).start()
    run.wait_for_round(1)
    host, _ = federation.leaves["site-2"]
    host.switch("down")
    assert eventually(lambda: any(record["failed"] for record in run.records()), 200), run.lines
    host.switch("up")
    found = run.end()
    missed = [record["round"] for record in run.records() if record["failed"]]
    assert run.records()[-1]["failed"] == [], "it is back before the end"
    there = [number for number in range(1, 11) if number not in missed]
    np.testing.assert_allclose(found, expected_weights(10, {"site-2": there}), atol=1e-6)
