"""A site's launcher, started by the server: as a command, or forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Protocol, cast

from shoal.errors import ConfigurationError, EngineError
from shoal.processes.forking import fork
from shoal.sites.address import FOLDER, NAME, Address
from shoal.sites.agent import attend
from shoal.sites.spec import Site


@dataclass(frozen=True)
class Launcher:
    """A site's launcher that was started."""

    pid: int
    """Its process, which has begun a session of its own."""
    output: IO[bytes]
    """What it and its ranks write."""
    wait: Callable[[], object]
    """Waits for its end, after which its number in the process table may be another's."""

    def reap(self) -> None:
        """Waits for its end in a thread."""
        threading.Thread(target=self.wait, name="shoal-wait", daemon=True).start()


class Starter(Protocol):
    """Starts a site's launcher."""

    def __call__(self, address: Address, site: Site, env: Mapping[str, str]) -> Launcher:
        """Starts it.

        Args:
            address: The server's.
            site: The site.
            env: Environment variables beside this process's own.

        Raises:
            ConfigurationError: The command cannot be run.
            EngineError: There cannot be one more process.
        """
        ...  # pragma: no cover


def start_script(script: str, args: Sequence[str]) -> Starter:
    """Returns what starts sites that run a script.

    Args:
        script: Its path.
        args: Arguments that all sites have.
    """

    def start(address: Address, site: Site, env: Mapping[str, str]) -> Launcher:
        python = site.python or sys.executable
        rank = [python, "-u", script, *args, *site.args]
        command = [*site.command, python, "-m", "shoal.sites.agent", str(site.ranks), site.spread.strategy, *rank]
        own = {FOLDER: str(address.folder), NAME: site.name}
        try:
            process = subprocess.Popen(
                command,
                env={**os.environ, **env, **site.env, **own},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to the server alone, which ends the sites in order
            )
        except OSError as error:
            raise ConfigurationError(f"{site.name} cannot be started: {' '.join(command[:3])}: {error}") from error
        return Launcher(process.pid, cast("IO[bytes]", process.stdout), process.wait)

    return start


def start_forked(body: Callable[[Site], None]) -> Starter:
    """Returns what starts sites whose ranks are forked, and have what this process has in memory.

    Args:
        body: Is a rank.
    """

    def start(address: Address, site: Site, env: Mapping[str, str]) -> Launcher:
        out, into = os.pipe()

        def launcher() -> None:
            os.setsid()
            os.dup2(into, 1)
            os.dup2(into, 2)
            # A notebook, or whatever else has put its own in their place, shall not have what the ranks write.
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
            os.environ.update({**env, **site.env})
            of_tensorflow = site.spread.strategy == "multiworker"
            attend(address, site.name, rank, site.ranks, of_tensorflow=of_tensorflow)

        def rank() -> None:
            # The elastic launcher's own handler waits for Python's turn, which a rank that waits in C does not give.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            body(site)

        try:
            pid = fork(launcher)
        except OSError as error:
            raise EngineError(f"{site.name} cannot be started: {error}") from error
        finally:
            os.close(into)
        return Launcher(pid, os.fdopen(out, "rb"), partial(_reap, pid))

    return start


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:  # this process has others that wait for every child
        return
