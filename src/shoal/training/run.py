"""The entry points: from a training, or from its parts, to a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from shoal.data import Dataset, Subset, as_dataset
from shoal.description import describe
from shoal.devices import Devices
from shoal.errors import ConfigurationError, unknown_name
from shoal.learners.base import Learner, OngoingTraining, TrainableLearner
from shoal.runs import RunFolder, environment, require_tensorboard, require_trackers, sigterm_raised
from shoal.training.callbacks import TrainingCallback
from shoal.training.definition import Settings, Training
from shoal.training.loop import TrainingLoop
from shoal.training.result import TrainingResult
from shoal.training.storage import TrainingStorage


def train(
    learner: Learner,
    data: Any,
    *,
    epochs: int,
    devices: Devices | None = None,
    evaluate: Any = None,
    seed: int = 0,
    name: str = "training",
    run_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainingCallback] = (),
    **settings: Unpack[Settings],
) -> TrainingResult:
    """Trains a model on the devices of one site.

    Example::

        devices = shoal.Devices("ddp", count=4)
        shoal.train(learner, dataset, devices=devices, epochs=20, evaluate=test_set, run_dir="runs/har")

    The result is a function of the learner, the data, the seed and the number of examples in a step, whatever the
    number of devices. With ``ddp`` and ``fsdp`` each device has a process: start the script with
    ``torchrun --nproc_per_node=4 script.py``, and all of them call this function with the same arguments; rank 0 alone
    writes the folder and tells the callbacks. Or use ``shoal train``, which starts them itself.

    Args:
        learner: Trains and evaluates the model.
        data: What to train on: arrays, a torch data set, or one of shoal's.
        epochs: Passes over the data.
        devices: Where; None for the learner's own.
        evaluate: Held-out data to measure the model on.
        seed: Decides all randomness of the training.
        name: Heads the report.
        run_dir: The run's folder; None to keep everything in memory.
        resume: Go on with the training that ``run_dir`` holds, from the middle of an epoch if need be.
        callbacks: Told of what happens; ``shoal.TrainingProgress()`` shows it.
        settings: Any further field of :class:`~shoal.Training`, such as ``patience`` or ``checkpoint_every``.

    Raises:
        ConfigurationError: Something was asked for that cannot be; nothing was written.
        StorageError: The run folder cannot be written.
        WorkerError: Another rank is gone.
        RunInterrupted: Ctrl-C or SIGTERM came.
    """
    learner = learner if devices is None else learner.on(devices)
    plan = Training(learner=learner, data=data, epochs=epochs, evaluate=evaluate, seed=seed, name=name, **settings)
    return run_training(plan, run_dir=run_dir, resume=resume, callbacks=callbacks)


def run_training(
    plan: Training,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainingCallback] = (),
) -> TrainingResult:
    """Runs a training; :func:`train` says what is raised.

    Args:
        plan: What to train.
        run_dir: The run's folder; None to keep everything in memory.
        resume: Go on with the training that ``run_dir`` holds.
        callbacks: Told of what happens.
    """
    if plan.trace and run_dir is None:
        raise ConfigurationError("trace=True writes to the run folder: name one with run_dir=…")
    if plan.trackers and run_dir is None:
        raise ConfigurationError("trackers follow the run folder: name one with run_dir=…")
    data = as_dataset(plan.data)
    held_out = None if plan.evaluate is None else as_dataset(plan.evaluate)
    data.check()
    if held_out is not None:
        held_out.check()
    learner = plan.learner
    if not isinstance(learner, TrainableLearner):
        raise ConfigurationError(f"{type(learner).__name__} trains in federations only: use a shoal.TorchLearner")
    # Its cached arrays become the training's, which may divide them among devices.
    learner = learner.on(learner.devices)
    plan = dataclasses.replace(plan, learner=learner)
    learner.check(data)
    if held_out is not None:
        learner.check(held_out)
        _check_metric(plan, held_out)
    with (
        sigterm_raised(),
        learner.training(data, epochs=plan.epochs, seed=plan.seed, scale_lr=plan.scale_lr) as ongoing,
    ):
        leads = ongoing.rank == 0
        folder = recording = None
        if leads and run_dir is not None:
            if plan.trace:
                recording = ongoing.recorded(Path(run_dir) / "trace" / "rank-0.json")
            folder = _open_folder(plan, ongoing, data, held_out, Path(run_dir), resume=resume)
        with TrainingStorage(folder, keep=plan.keep_checkpoints) as storage:
            told = callbacks if leads else ()
            loop = TrainingLoop(
                plan, ongoing, len(data), held_out, storage=storage, callbacks=told, recording=recording
            )
            return loop.run()


def _check_metric(plan: Training, held_out: Dataset) -> None:
    """Measures two examples, so that a metric that does not exist is refused now and not after the first epoch."""
    if plan.metric is None:
        return
    known = plan.learner.evaluate(plan.learner.init(plan.seed), Subset(held_out, np.arange(min(2, len(held_out)))))
    if plan.metric not in known:
        raise unknown_name("metric", plan.metric, list(known))


def _open_folder(
    plan: Training, ongoing: OngoingTraining, data: Dataset, held_out: Dataset | None, path: Path, *, resume: bool
) -> RunFolder:
    if plan.tensorboard:
        require_tensorboard()
    require_trackers(plan.trackers)
    batching = ongoing.batching
    config = {
        "identity": plan.identity(
            data,
            held_out,
            effective_batch=min(batching.effective, len(data)),
            lr_factor=batching.effective / batching.per_device if plan.scale_lr else 1.0,
        ),
        "options": plan.options(),
        "environment": environment(
            seed=plan.seed,
            devices={**describe(plan.learner.devices), "accelerator": ongoing.accelerator},
            batch={
                "per_device": batching.per_device,
                "devices": batching.devices,
                "accumulate": batching.accumulate,
            },
        ),
    }
    return RunFolder.open(path, config, resume=resume, space=_space(plan, ongoing))


def _space(plan: Training, ongoing: OngoingTraining) -> int:
    """Returns how many bytes the checkpoints will take: the model, and two more of its size for the optimizer."""
    return 3 * ongoing.model_bytes * (plan.keep_checkpoints + 2)
