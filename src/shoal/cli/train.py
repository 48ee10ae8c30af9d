"""``shoal train``."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.child import LAUNCHER, end_with_launcher
from shoal.cli.devices import AskedDevices, parse_ids
from shoal.cli.exits import REFUSED
from shoal.cli.options import DataDir, Precision, RunDir, Seed, Trackers, check_resume
from shoal.cli.runs import in_new_folder, new_folders, reserved_folder, resume_command
from shoal.devices import Launched
from shoal.errors import ConfigurationError, RunInterrupted

if TYPE_CHECKING:
    from shoal.learners.torch_launch import Nodes
    from shoal.training import Training

Count = Annotated[
    int | None, typer.Option("--devices", help="Devices on this machine, a process for each but with dp and mirrored.")
]
StrategyName = Annotated[
    str | None, typer.Option("--strategy", help="single, dp, ddp, fsdp; for Keras mirrored, multiworker; several: ddp.")
]
Ids = Annotated[str | None, typer.Option(help="The CUDA devices to use, such as 0,1,3.")]
Accelerator = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the data.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples in a batch on each device.")]
Accumulate = Annotated[int | None, typer.Option(help="Batches on each device that make one step.")]
ScaleLr = Annotated[bool, typer.Option("--scale-lr", help="Scale the learning rate with the effective batch.")]
Patience = Annotated[int | None, typer.Option(help="Stop after so many epochs without a better metric.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints within an epoch.")]
NodeCount = Annotated[int, typer.Option("--nodes", help="Machines that run this command together.")]
NodeRank = Annotated[int, typer.Option(help="Which of them this is, from 0.")]
Rendezvous = Annotated[str | None, typer.Option(help="HOST:PORT on machine 0, where they meet.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the training in --run-dir.")]
Trace = Annotated[bool, typer.Option("--trace", help="Record some steps with torch's profiler.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any further setting, such as learner.clip_norm=1."),
]


def train(
    experiment: Annotated[str, typer.Argument(help="A Python file, or digits, fashion_mnist, cifar10, synthetic.")],
    devices: Count = None,
    strategy: StrategyName = None,
    ids: Ids = None,
    accelerator: Accelerator = None,
    precision: Precision = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    scale_lr: ScaleLr = False,
    patience: Patience = None,
    checkpoint_every: CheckpointEvery = None,
    seed: Seed = None,
    data_dir: DataDir = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    trace: Trace = False,
    nodes: NodeCount = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = None,
    trackers: Trackers = None,
    settings: Set = None,
) -> None:
    """Train one model on the devices of one site."""
    asked = AskedDevices(
        count=devices, strategy=strategy, ids=parse_ids(ids), accelerator=accelerator, precision=precision
    )
    options: dict[str, object] = {"learner.batch_size": batch_size, "learner.accumulate": accumulate, "seed": seed}
    options |= {"patience": patience, "checkpoint_every": checkpoint_every, "data_dir": data_dir}
    options |= {"scale_lr": scale_lr or None, "trace": trace or None}
    check_resume(resume, run_dir)
    several, place = _nodes(nodes, node_rank, rendezvous), Launched.here()
    if place is None:
        processes = asked.processes()
        if processes > 1 or several is not None or asked.of_tensorflow:
            name, of_tensorflow = Path(experiment).stem, asked.of_tensorflow
            raise typer.Exit(_launch(processes, several, run_dir, name, of_tensorflow=of_tensorflow))
    else:
        end_with_launcher()
    plan = _plan(experiment, options, settings or [], epochs)
    plan = dataclasses.replace(plan, learner=plan.learner.on(asked.over(plan.learner.devices, place)))
    if trackers:
        plan = dataclasses.replace(plan, trackers=tuple(trackers))
    if run_dir is not None:
        _execute(plan, run_dir, resume=resume)
    elif place is not None:
        _execute(plan, next(new_folders(plan.name)), resume=False)
    else:
        in_new_folder(plan.name, lambda path: _execute(plan, path, resume=False))


def _nodes(count: int, rank: int, rendezvous: str | None) -> Nodes | None:
    if count == 1:
        if rank or rendezvous:
            raise ConfigurationError("--node-rank and --rendezvous are for several machines: say how many with --nodes")
        return None
    if count < 1 or not 0 <= rank < count:
        raise ConfigurationError(
            f"--nodes must be ≥ 1 and --node-rank from 0 to {max(count, 1) - 1}, not {count} and {rank}"
        )
    host, _, port = (rendezvous or "").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigurationError(
            f"{count} machines meet where all can reach machine 0: --rendezvous HOST:PORT, not {rendezvous!r}"
        )
    from shoal.learners.torch_launch import Nodes

    return Nodes(count=count, rank=rank, rendezvous=f"{host}:{port}")


def _launch(processes: int, nodes: Nodes | None, run_dir: Path | None, name: str, *, of_tensorflow: bool) -> int:
    """Runs this process's command in ranks; returns the exit code."""
    from shoal.learners.torch_launch import RanksFailedError, launch_ranks

    command = [sys.executable, "-m", "shoal", *sys.argv[1:]]
    reserved = None
    if run_dir is None:
        if nodes is not None:
            raise ConfigurationError("several machines write one folder, which all must know: name it with --run-dir")
        reserved = reserved_folder(name)
        command += ["--run-dir", str(reserved)]
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        launch_ranks(command, processes=processes, nodes=nodes, of_tensorflow=of_tensorflow)
    except RanksFailedError as error:
        failure = error.failure
        for line in failure.unheard:
            print(f"rank {failure.rank}: {line}", file=sys.stderr)
        if failure.code == REFUSED:
            return REFUSED
        raise
    finally:
        if reserved is not None and not any(reserved.iterdir()):
            reserved.rmdir()
    return 0


def _plan(name: str, options: dict[str, object], pairs: list[str], epochs: int | None) -> Training:
    from shoal.experiments import build_training, load_training, parse_settings

    given = {key: str(value) for key, value in options.items() if value is not None}
    return build_training(load_training(name), parse_settings(pairs) | given, epochs=epochs)


def _execute(plan: Training, path: Path, *, resume: bool) -> None:
    from shoal.training import TrainingProgress, run_training

    try:
        run_training(plan, run_dir=path, resume=resume, callbacks=[TrainingProgress()])
    except RunInterrupted as interrupt:
        message = f"{interrupt}; to go on: {resume_command(path)}"
        raise RunInterrupted(message) from interrupt.__cause__
