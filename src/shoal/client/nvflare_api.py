"""NVFlare's Client API on a site's tasks, so that scripts written for it are sites of shoal::

    import shoal.client.nvflare_api as flare  # in place of: import nvflare.client as flare

What differs: every rank is given each task, so that ``is_running`` and ``receive`` may be called on all ranks, or on
rank 0 alone. Metrics of a training task are taken as means over the training, not as measurements of the model that was
received. NVFlare itself is not needed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from shoal.client.flare_tasks import FlareTasks
from shoal.client.loop import config
from shoal.client.task import Task
from shoal.errors import ConfigurationError
from shoal.sites.address import FOLDER, NAME

__all__ = [
    "AnalyticsDataType",
    "FLModel",
    "ParamsType",
    "clear",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "receive",
    "send",
    "shutdown",
    "system_info",
]

STEPS = "NUM_STEPS_CURRENT_ROUND"
"""What scripts call their weight among an :class:`FLModel`'s ``meta``."""

TASKS = {"train": "train", "evaluate": "validate"}
"""NVFlare's names of the kinds of tasks."""


class ParamsType(StrEnum):
    """What parameters are: the whole model, or what has changed."""

    FULL = "FULL"
    DIFF = "DIFF"


class AnalyticsDataType(Enum):
    """What is logged; of these shoal takes numbers."""

    SCALAR = "SCALAR"
    SCALARS = "SCALARS"
    METRIC = "METRIC"
    METRICS = "METRICS"
    TEXT = "TEXT"
    TAG = "TAG"
    PARAMETER = "PARAMETER"
    PARAMETERS = "PARAMETERS"


class FLModel:
    """A model on its way from the server or to it; the fields are NVFlare's.

    Args:
        params_type: ``FULL`` or ``DIFF``; None means ``FULL`` where there are parameters.
        params: Arrays by name.
        optimizer_params: Not sent.
        metrics: Numbers by name.
        start_round: The first round's number.
        current_round: This round's number, counted from 0.
        total_rounds: How many there are.
        meta: More; of it ``NUM_STEPS_CURRENT_ROUND`` is the site's weight.

    Raises:
        ValueError: A type is said and there are no parameters, or it is neither of the two.
    """

    def __init__(  # noqa: PLR0917 - the order is NVFlare's
        self,
        params_type: ParamsType | str | None = None,
        params: Any = None,
        optimizer_params: Any = None,
        metrics: dict[str, Any] | None = None,
        start_round: int | None = 0,
        current_round: int | None = None,
        total_rounds: int | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        if params_type is None and params is not None:
            params_type = ParamsType.FULL
        if params_type is not None and params is None:
            raise ValueError(f"an FLModel of params_type {params_type} has params, too")
        self.params_type = None if params_type is None else ParamsType(params_type)
        self.params = params
        self.optimizer_params = optimizer_params
        self.metrics = metrics
        self.start_round = start_round
        self.current_round = current_round
        self.total_rounds = total_rounds
        self.meta = {} if meta is None else meta

    def summary(self) -> dict[str, Any]:
        """Returns what there is, in short."""
        return {key: len(value) if isinstance(value, dict) else value for key, value in vars(self).items() if value}

    def __repr__(self) -> str:
        return f"FLModel({self.summary()})"


_tasks: list[FlareTasks] = []
"""This process's tasks: one source, or none before :func:`init`."""

_received: list[tuple[Task, FLModel]] = []
"""The model that was received last, until its task is answered."""

_logged: dict[str, float] = {}
"""The numbers that were logged in this task."""


def init(
    rank: str | int | None = None,
    config_file: str | None = None,  # noqa: ARG001
    *,
    model: Any = None,
    evaluate: bool = False,
) -> None:
    """Joins the federation; every rank of the site calls it. A second call has no effect.

    Args:
        rank: Which this is, if ``RANK`` is not set; shoal's launcher sets it.
        config_file: Not used.
        model: What the script starts from when it runs by itself, outside of a federation.
        evaluate: Whether the script looks at :func:`is_evaluate`, and measures where that says so.

    Raises:
        ConfigurationError: The rank is not the one that the launcher has said.
        WorkerError: The server cannot be reached.
    """
    if _tasks:
        logging.getLogger("shoal").warning("flare.init() was called already; this call has no effect")
        return
    said = os.environ.get("RANK", "0")
    if rank is not None and str(rank) != said:
        raise ConfigurationError(
            f"flare.init(rank={rank}) is called in the process whose rank is {said}: "
            "leave the rank out, or give torch.distributed's own"
        )
    _tasks.append(FlareTasks(int(said), model, evaluate=evaluate))


def is_running(ctx: Any = None) -> bool:  # noqa: ARG001
    """Tells whether there is a task, and waits for that.

    On rank 0 it is the same task until :func:`send` has answered it. On the other ranks, each call is about the next
    one, as in ``while flare.is_running(): …``.

    Raises:
        ConfigurationError: :func:`init` was not called.
        WorkerError: The server, or another rank, is gone.
    """
    return _opened().ask(None) is not None


def receive(timeout: float | None = None, ctx: Any = None) -> FLModel | None:  # noqa: ARG001
    """Returns the global model for the next task, on whichever rank calls it; None once there are no more tasks.

    On rank 0 it is the same until :func:`send`.

    Args:
        timeout: Seconds to wait; None comes back after them, too.
        ctx: Not used.

    Raises:
        ConfigurationError: :func:`init` was not called.
        WorkerError: The server, or another rank, is gone.
    """
    task = _opened().take(timeout)
    if task is None:
        return None
    if not _received or _received[0][0] is not task:
        _received[:] = [(task, _model_of(task))]
    return _received[0][1]


def send(model: FLModel, clear_cache: bool = True, ctx: Any = None) -> None:  # noqa: ARG001
    """Answers the task that was received. On ranks other than 0 nothing is sent.

    Args:
        model: With ``params``, whole or as a difference, where the task is to train.
        clear_cache: Whether to let go of the parameters of both models.
        ctx: Not used.

    Raises:
        ConfigurationError: There is no task to answer, or the model is not whole.
        WorkerError: The server is gone.
    """
    opened = _opened()
    if opened.rank == 0:
        task = opened.current()
        if task is None:
            raise ConfigurationError("there is no task to answer: call flare.receive() first")
        if model.params is None and model.metrics is None:
            raise ConfigurationError("the model to send has neither params nor metrics")
        metrics = {**_logged, **_numbers(model.metrics or {})}
        task.reply(examples=float(model.meta.get(STEPS, 1.0)), metrics=metrics, **_answer(task, model))
        opened.answered()
    _logged.clear()
    if clear_cache:
        for each in (model, *(received for _, received in _received)):
            each.params = each.optimizer_params = None
    _received.clear()


def system_info(ctx: Any = None) -> dict[str, Any]:  # noqa: ARG001
    """Returns the names of the job and of this site."""
    return {"job_id": get_job_id(), "site_name": get_site_name()}


def get_config(ctx: Any = None) -> dict[str, Any]:  # noqa: ARG001
    """Returns the site's own settings, with the names of the job and of this site."""
    return {**config(), **system_info()}


def get_job_id(ctx: Any = None) -> str:  # noqa: ARG001
    """Returns what tells this federation from others on the machine."""
    return Path(os.environ.get(FOLDER, "local")).name


def get_site_name(ctx: Any = None) -> str:  # noqa: ARG001
    """Returns this site's name; ``local`` outside of a federation."""
    return os.environ.get(NAME, "local")


def get_task_name(ctx: Any = None) -> str:  # noqa: ARG001
    """Returns ``train`` or ``validate``; of the task that was received last, else of the next.

    Raises:
        ConfigurationError: There are no more tasks.
    """
    task = _opened().current() or _opened().ask(None)
    if task is None:
        raise ConfigurationError("the federation is over: ask flare.is_running() first")
    return TASKS[task.kind]


def is_train(ctx: Any = None) -> bool:  # noqa: ARG001
    """Tells whether the task is to train."""
    return get_task_name() == TASKS["train"]


def is_evaluate(ctx: Any = None) -> bool:  # noqa: ARG001
    """Tells whether the task is to measure the model; there are such only after ``init(evaluate=True)``."""
    return get_task_name() == TASKS["evaluate"]


def is_submit_model(ctx: Any = None) -> bool:  # noqa: ARG001
    """Returns False: shoal has no such tasks."""
    return False


def log(key: str, value: Any, data_type: Any = None, ctx: Any = None, **more: Any) -> bool:  # noqa: ARG001
    """Adds a number to the metrics of the task's answer; the last one of a name counts.

    Returns:
        Whether it is one.
    """
    found = _numbers({key: value})
    _logged.update(found)
    return bool(found)


def clear(ctx: Any = None) -> None:  # noqa: ARG001
    """Lets go of the model that was received."""
    _received.clear()


def shutdown(ctx: Any = None) -> None:  # noqa: ARG001
    """Takes no more tasks."""
    _opened().leave()


def _model_of(task: Task) -> FLModel:
    if task.alone and not task.model.merged():
        raise ConfigurationError(
            "this script runs by itself, so no server has sent parameters: "
            "say what it starts from with flare.init(model=net)"
        )
    return FLModel(
        params=task.params,
        current_round=task.round - 1,
        total_rounds=task.rounds,
        meta={"site_name": task.site, "job_id": get_job_id()},
    )


def _answer(task: Task, model: FLModel) -> dict[str, Any]:
    """Returns the parameters of an answer, as a task takes them."""
    if task.kind != "train":
        return {}
    if model.params_type is not ParamsType.DIFF:
        return {"params": model.params}
    buffers = {name: model.params[name] for name in task.model.buffers if name in model.params}
    return {"delta": {name: array for name, array in model.params.items() if name not in buffers}, "buffers": buffers}


def _numbers(given: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers among values; scripts log text, too."""
    found = {}
    for name, value in given.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError):
            continue
    return found


def _opened() -> FlareTasks:
    if not _tasks:
        raise ConfigurationError("call flare.init() first, at the start of the script")
    return _tasks[0]
