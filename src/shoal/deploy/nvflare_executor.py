"""The executor of NVFlare's clients: it brings each task to the site's own process, and that one's answer back."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from shoal.deploy.attendant import PrivateSite
from shoal.deploy.bridge import forward
from shoal.deploy.nvflare_job import ORDER
from shoal.deploy.nvflare_messages import REASON, TASK, WITHIN, packed, unpacked
from shoal.deploy.parcel import Parcel
from shoal.deploy.private_site import write_site
from shoal.deploy.site_settings import Allowed
from shoal.errors import ConfigurationError

FOLDER = "SHOAL_SITE_FOLDER"
"""The environment variable of a client of NVFlare with the folder of its ``shoal site``."""

FOLDER_FILE = "shoal_site"
"""The file in the client's folder ``local`` that has the same."""

GLANCE = 0.1
"""Seconds between two looks at whether the job was aborted."""

SIMULATED = "simulate_job"
"""The number of the job under NVFlare's simulator, where a client has a new process for each of its turns."""


class ShoalExecutor(Executor):  # type: ignore[misc]  # NVFlare has no types
    """Stands for a site of shoal's in a client of NVFlare; no framework is imported in its process.

    The site's folder is the one in the environment variable ``SHOAL_SITE_FOLDER``, else the one in the file
    ``local/shoal_site`` of the client, else the argument: that one comes with the job, and who submits a job is not to
    choose among the sites of a machine. A client that has none, as under the simulator, starts a ``shoal site`` of its
    own, which ends with the job.

    Args:
        site_folder: The folder of the ``shoal site`` to speak to, where the client itself names none.
    """

    def __init__(self, site_folder: str = "") -> None:
        super().__init__()
        self._given = site_folder
        self._private: PrivateSite | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Ends the client's own ``shoal site`` with the job."""
        if event_type == EventType.END_RUN and self._folder_given(fl_ctx) is None:
            self._private_site(fl_ctx).stop()  # which another process of this client may have started

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Brings a task to the site, and returns its answer; gives up when the job is aborted."""
        if task_name != TASK:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        within = float(shareable.get_header(WITHIN))
        try:
            parcel = unpacked(shareable)
            folder = self._folder(fl_ctx, abort_signal)
            found = self._forwarded(parcel, folder, within, abort_signal)
        except (ValueError, RuntimeError, OSError) as error:
            self.log_error(fl_ctx, f"shoal: {error}")
            return make_reply(ReturnCode.EXECUTION_EXCEPTION, {REASON: f"{fl_ctx.get_identity_name()}: {error}"})
        return make_reply(ReturnCode.TASK_ABORTED) if found is None else packed(found)

    def forward(self, parcel: Parcel, folder: Path, within: float) -> Parcel:
        """Brings a parcel to the site's process; see :func:`shoal.deploy.bridge.forward`."""
        return forward(parcel, folder, within=within)

    def private_site(self, folder: Path, name: str, fl_ctx: FLContext) -> Sequence[str]:
        """Makes a site for this job alone, which runs what the job's order says and nothing else.

        Args:
            folder: The site's.
            name: The client's.
            fl_ctx: Of the task.

        Returns:
            The command that starts it.

        Raises:
            ConfigurationError: The job has no order, or brings no code, so that this client cannot have allowed that.
        """
        if fl_ctx.get_job_id() != SIMULATED and not (fl_ctx.get_prop(FLContextKey.JOB_META) or {}).get("byoc"):
            raise ConfigurationError(
                f"no shoal site is known here: start one, and write its folder into local/{FOLDER_FILE} of this client"
            )
        order = read_order(_workspace(fl_ctx), fl_ctx.get_job_id(), ORDER)
        return write_site(folder, name, [Allowed(name=order["name"], source=order["experiment"], settings=("*",))])

    def _forwarded(self, parcel: Parcel, folder: Path, within: float, abort_signal: Signal) -> Parcel | None:
        """Returns the site's answer; None where the job was aborted meanwhile."""
        answers: queue.SimpleQueue[Parcel | Exception] = queue.SimpleQueue()

        def call() -> None:
            try:
                answers.put(self.forward(parcel, folder, within))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=call, name="shoal-forward", daemon=True).start()
        while not abort_signal.triggered:
            try:
                answer = answers.get(timeout=GLANCE)
            except queue.Empty:
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        return None

    def _folder(self, fl_ctx: FLContext, abort_signal: Signal) -> Path:
        given = self._folder_given(fl_ctx)
        if given is not None:
            return given
        site = self._private_site(fl_ctx)
        name = fl_ctx.get_identity_name()
        site.start(lambda: self.private_site(site.folder, name, fl_ctx), aborted=lambda: bool(abort_signal.triggered))
        return site.folder

    def _folder_given(self, fl_ctx: FLContext) -> Path | None:
        if said := os.environ.get(FOLDER):
            return Path(said)
        path = Path(_workspace(fl_ctx).get_site_config_dir()) / FOLDER_FILE
        try:
            said = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return Path(self._given) if self._given else None
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from error
        return Path(said)

    def _private_site(self, fl_ctx: FLContext) -> PrivateSite:
        if self._private is None:
            simulated = fl_ctx.get_job_id() == SIMULATED
            folder = Path(_workspace(fl_ctx).get_run_dir(fl_ctx.get_job_id())) / "shoal_site"
            # The simulator ends a client's process after each of its turns; what began them all lives as long as it.
            self._private = PrivateSite(folder, ends_with=os.getppid() if simulated else os.getpid())
        return self._private


def read_order(workspace: Any, job: str, name: str) -> dict[str, Any]:
    """Returns what a job is to run, with the path of the experiment where the job has brought that.

    Args:
        workspace: NVFlare's.
        job: The job's number.
        name: The file beside the job's configuration that says it.

    Raises:
        ConfigurationError: There is no such file, or it names code that a job has brought as anything but code.
    """
    path = Path(workspace.get_app_config_dir(job)) / name
    try:
        order: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        custom = Path(workspace.get_app_custom_dir(job)).resolve()
        brought = (custom / order["experiment"]).resolve()
        everything = Path(workspace.get_root_dir()).resolve()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"the job has no order of shoal's in {path}: {error}; export it again") from error
    if brought.is_relative_to(custom) and brought.exists():
        return {**order, "experiment": str(brought)}
    # NVFlare asks whether a job may bring code by this folder alone; other files come with any job.
    if any(
        path.exists() and path.is_relative_to(everything) for path in (brought, Path(order["experiment"]).resolve())
    ):
        raise ConfigurationError(f"{order['experiment']} is no code that this job has brought: export it again")
    return order


def _workspace(fl_ctx: FLContext) -> Any:
    return fl_ctx.get_engine().get_workspace()
