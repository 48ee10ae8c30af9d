"""What NVFlare's own processes import of shoal: a controller for its server, and an executor for its clients.

A job of :func:`shoal.deploy.nvflare_job.write_job` names them, and sites that allow components by their names list
``shoal.nvflare.ShoalController`` and ``shoal.nvflare.ShoalExecutor``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from shoal.errors import MissingExtraError, ShoalError
from shoal.federation.callbacks import Callback
from shoal.federation.progress import Progress

try:
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.impl.controller import Controller
    from nvflare.apis.signal import Signal
except ImportError as missing:
    raise MissingExtraError("nvflare", purpose="federate over NVFlare", extra="nvflare") from missing

from rich.console import Console

from shoal.deploy.nvflare_executor import ShoalExecutor, read_order
from shoal.deploy.nvflare_job import MARK, ORDER, RUN
from shoal.deploy.nvflare_wire import DAY, NvflareWire

__all__ = ["ShoalController", "ShoalExecutor"]


class ShoalController(Controller):  # type: ignore[misc]  # NVFlare has no types
    """Runs a federation of shoal on the server of a job: shoal decides, and NVFlare carries.

    Args:
        order: The name of the file, beside the job's configuration, with what is to be run.
        within: Seconds in which a client must answer a task.
        glance: Seconds between two looks of NVFlare at which tasks are done.
    """

    def __init__(self, order: str = ORDER, within: float = DAY, glance: float = 0.05) -> None:
        super().__init__(task_check_period=glance)
        self._order = order
        self._within = within

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Does nothing: the run begins with the control flow."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Does nothing: the run has ended with the control flow."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Runs the federation; an error of shoal's ends the job as failed, with its message."""
        try:
            text = json.dumps(read_order(_workspace(fl_ctx), fl_ctx.get_job_id(), self._order))
            wire = NvflareWire(self, fl_ctx, abort_signal, within=self._within)
            self.run_order(wire, text, run_folder(fl_ctx), (Progress(_log_console()),))
        except ShoalError as error:
            self.system_panic(f"{MARK}{error}", fl_ctx)  # which says it in the log, too

    def run_order(self, wire: NvflareWire, text: str, folder: Path, callbacks: Sequence[Callback]) -> None:
        """Runs what is in the order.

        Args:
            wire: Carries the messages.
            text: The order, as JSON.
            folder: Where the run's folder is to be, unless the order says where.
            callbacks: What is to hear of it.

        Raises:
            ShoalError: It failed.
        """
        from shoal.deploy.order import Order
        from shoal.experiments.remote import run_over

        order = Order.from_json(text)
        if not Path(order.run_dir or ".").is_absolute():
            order = dataclasses.replace(order, run_dir=str(folder))
        run_over(wire, order, callbacks)


def run_folder(fl_ctx: FLContext) -> Path:
    """Returns where a job on NVFlare's server has its run, which is downloaded with the job."""
    return Path(_workspace(fl_ctx).get_run_dir(fl_ctx.get_job_id())) / RUN


def _workspace(fl_ctx: FLContext) -> Any:
    return fl_ctx.get_engine().get_workspace()


def _log_console() -> Console:
    return Console(file=cast(IO[str], _LogLines()), width=160, force_terminal=False)


class _LogLines(io.TextIOBase):
    """Has lines appear in the job's log, marked as shoal's."""

    def __init__(self) -> None:
        super().__init__()
        self._rest = ""
        self._log = logging.getLogger(__name__)

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._log.info("%s%s", MARK, line.rstrip())
        return len(text)
