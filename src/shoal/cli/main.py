"""The command ``shoal``: what it offers, and how it ends.

Exit codes: 0 done · 1 the run failed (a client, a number, a disk) · 2 something was asked for that cannot be ·
130 stopped by Ctrl-C · 143 stopped by SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import click
import typer

from shoal.cli import doctor, federate, report
from shoal.errors import ClientError, ConfigurationError, RunInterrupted, ShoalError
from shoal.version import __version__

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143

app = typer.Typer(
    name="shoal",
    help="One training definition for one GPU, many GPUs, many machines, and many sites whose data cannot move.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 the request cannot be met, 130 Ctrl-C, 143 SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(federate.demo)
app.command("federate")(federate.federate)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: it ends a run as Ctrl-C does, with its state saved."""


@app.callback(invoke_without_command=True)
def options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Options that stand before a command."""
    if version:
        print(f"shoal {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Runs the command line and exits with a documented code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = REFUSED
    except click.Abort:
        code = INTERRUPTED
    except KeyboardInterrupt as interrupt:
        code = _report_interrupt(interrupt)
    except ShoalError as error:
        code = _report_error(error)
    sys.exit(code or 0)


def _terminate(_signum: int, _frame: FrameType | None) -> None:
    raise Terminated


def _report_interrupt(interrupt: KeyboardInterrupt) -> int:
    if isinstance(interrupt, RunInterrupted):
        print(f"\nshoal: {interrupt}", file=sys.stderr)
    else:
        print("\nshoal: stopped before anything was written", file=sys.stderr)
    by_signal = isinstance(interrupt, Terminated) or isinstance(interrupt.__cause__, Terminated)
    return TERMINATED if by_signal else INTERRUPTED


def _report_error(error: ShoalError) -> int:
    if isinstance(error, ClientError) and error.__cause__ is not None:
        _print_traceback(error.__cause__)
    print(f"shoal: error: {error}", file=sys.stderr)
    return REFUSED if isinstance(error, ConfigurationError) else FAILED


def _print_traceback(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error)
