"""The command ``shoal`` and what it offers."""

from __future__ import annotations

import io
import sys

import typer

from shoal.cli.bench import bench
from shoal.cli.deploy import deploy
from shoal.cli.doctor import doctor
from shoal.cli.exits import guarded
from shoal.cli.export import export
from shoal.cli.federate import demo, federate
from shoal.cli.report import report
from shoal.cli.site import site
from shoal.cli.submit import submit
from shoal.cli.supernode import supernode
from shoal.cli.train import train
from shoal.version import __version__

app = typer.Typer(
    name="shoal",
    help="One training definition for one GPU, many GPUs, many machines, and many sites whose data cannot move.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 the request cannot be met, 130 Ctrl-C, 143 SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, train, federate, export, submit, site, report, doctor):
    app.command()(guarded(command))
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(guarded(supernode))
for group in (deploy, bench):
    app.add_typer(group)


@app.callback(invoke_without_command=True)
def options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Options that stand before a command."""
    if version:
        print(f"shoal {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line and exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "·" shall show the rest
    app()
