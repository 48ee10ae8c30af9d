"""Trainers made from the user's options, quiet unless asked, and the processes that some of them start."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but from C
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from shoal.devices import Launched
from shoal.errors import ConfigurationError, WorkerError
from shoal.learners.lightning_watch import Watch
from shoal.processes.forking import leaving_garbage

SILENCE = timedelta(seconds=60)
"""How long a rank on a CPU waits for the others, unless the user's own strategy says otherwise."""

OWNED = {
    **dict.fromkeys(
        ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time"), "say epochs= or steps= instead"
    ),
    **dict.fromkeys(
        ("limit_train_batches", "overfit_batches", "fast_dev_run"),
        "a client trains on all of its data: give it less, or say steps=",
    ),
    **dict.fromkeys(
        (
            "limit_val_batches",
            "limit_test_batches",
            "limit_predict_batches",
            "num_sanity_val_steps",
            "val_check_interval",
            "check_val_every_n_epoch",
        ),
        "fit does not validate; evaluate() does, over all of the data it is given",
    ),
    **dict.fromkeys(
        ("use_distributed_sampler", "reload_dataloaders_every_n_epochs"),
        "the learner divides the batches among the ranks itself",
    ),
    "barebones": "it logs nothing, and what is logged becomes the update's metrics",
}
"""Trainer options that the learner sets itself, and what to do instead."""

PR_SET_PDEATHSIG = 1

_LAUNCH = threading.Lock()
"""Held while processes are started: what they need to find each other is in this process's environment."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options that the learner sets itself.

    Raises:
        ConfigurationError: There is one.
    """
    for name in options:
        if name in OWNED:
            raise ConfigurationError(f"the trainer option {name} cannot be used here: {OWNED[name]}")


def fit_trainer(options: Mapping[str, Any], callbacks: Sequence[Callback] = ()) -> Trainer:
    """Returns a new trainer for one call to ``fit``, of one epoch.

    Args:
        options: The user's. Objects that a trainer takes over, such as callbacks and strategies, are copied.
        callbacks: To be called before the user's.

    Raises:
        ConfigurationError: Lightning refuses the options, or the processes that they ask for cannot be started here.
    """
    options = dict(options)
    for name in ("callbacks", "strategy", "plugins", "accelerator"):
        if name in options:
            options[name] = deepcopy(options[name])
    own = options.pop("callbacks", None) or []
    theirs = [own] if isinstance(own, Callback) else list(own)
    quiet = {
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in theirs),
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in theirs),
        "enable_model_summary": any(isinstance(callback, ModelSummary) for callback in theirs),
    }
    if isinstance(options.get("strategy"), str):
        options["strategy"] = _impatient(options["strategy"], options.get("accelerator", "auto"))
    ours = {
        "max_epochs": 1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "reload_dataloaders_every_n_epochs": 1,
    }
    trainer = _made(quiet | options | ours | {"callbacks": [*callbacks, *theirs]})
    _check_launch(trainer, options.get("strategy"))
    return trainer


def one_device_trainer(options: Mapping[str, Any], **changes: Any) -> Trainer:
    """Returns a trainer on the first of the user's devices, without the user's callbacks and loggers.

    Args:
        options: The user's.
        changes: What to have otherwise.
    """
    kept = ("accelerator", "precision", "deterministic", "benchmark", "inference_mode", "detect_anomaly")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    chosen: dict[str, Any] = {name: deepcopy(options[name]) for name in kept if name in options}
    return _made({**chosen, "devices": first_device(options), **dict.fromkeys(quiet, False), **changes})


def first_device(options: Mapping[str, Any]) -> Any:
    """Returns the trainer option ``devices`` for one device: this rank's own, if a launcher has started several."""
    devices = options.get("devices", 1)
    if isinstance(devices, str) and "," in devices:
        devices = [int(index) for index in devices.split(",") if index.strip()]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return [devices[(_local_rank() or 0) % len(devices)]]
    rank = _local_rank()
    on_cpu = options.get("accelerator") == "cpu" or not torch.cuda.is_available()
    return 1 if on_cpu or rank is None else [rank]


def starts_processes(trainer: Trainer) -> bool:
    """Tells whether training will run in processes that Lightning starts from a function."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def end_with_caller() -> None:
    """Lets the kernel kill this process when the one that started it ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def launched(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Runs the trainer's processes, if there are any: they find each other, and none outlives the block.

    The place where they meet is held by this process from the moment that the system chose its port, so that no other
    training can come between. The environment is as before at the end.

    Args:
        trainer: About to train.
        folder: Where ranks that it starts tell that they have started.

    Raises:
        WorkerError: A rank has failed, or did not start in time.
    """
    launcher = trainer.strategy.launcher
    if _started_elsewhere(trainer):
        before = dict(os.environ)
        try:
            yield
        finally:
            os.environ |= before | os.environ  # Lightning takes away what it takes for its own, such as WORLD_SIZE
        return
    if launcher is None:
        yield
        return
    with _LAUNCH:
        before = dict(os.environ)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        alone = not torch.distributed.is_initialized()
        threads = torch.get_num_threads()
        if forks(trainer):
            # A forked process still counts on OpenMP threads that did not survive, and would wait for them for ever.
            torch.set_num_threads(1)
            place["OMP_NUM_THREADS"] = "1"  # or Lightning would set another number there
        os.environ |= place
        watch = Watch(launcher, folder, trainer.world_size)
        try:
            with watch, leaving_garbage():
                yield
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise (WorkerError(watch.late) if watch.late else _rank_failed(error)) from error
        finally:
            _end(launcher)
            if alone and torch.distributed.is_initialized():  # with "ddp" on one device it is this process's
                torch.distributed.destroy_process_group()
            torch.set_num_threads(threads)
            os.environ.clear()
            os.environ |= before


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps Lightning's notices and hints back, and lets an interruption be one, where Lightning would exit."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    hush()
    try:
        with warnings.catch_warnings():
            _ignore_hints()
            yield
    except SystemExit as error:
        if isinstance(error, SIGTERMException):  # Lightning's handler took the signal from the one that was there
            signal.raise_signal(signal.SIGTERM)
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if main:
            signal.signal(signal.SIGINT, handler)


def hush() -> None:
    """Keeps Lightning's notices back."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Hush:
    """Keeps Lightning's notices and hints back in each process that it is sent to, from the moment it arrives."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _hushed, ()


def _hushed() -> Hush:
    hush()
    _ignore_hints()
    return Hush()


def _ignore_hints() -> None:
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    # Forked ranks compute with one thread, see `launched`; the store's own thread stays with the caller.
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    # On one device there is nothing to divide, and torch says so.
    warnings.filterwarnings("ignore", message="FSDP is switching to use `NO_SHARD`", category=UserWarning)
    # Lightning 2.6 calls what torch 2.13 has replaced.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)


def _made(options: Mapping[str, Any]) -> Trainer:
    try:
        with quietly():
            return Trainer(**options)
    except (MisconfigurationException, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"Lightning refuses the trainer options: {first}") from error


def _impatient(strategy: str, accelerator: Any) -> Any:
    """Returns the strategy of that name; on a CPU one whose ranks do not wait for each other for half an hour."""
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    known = StrategyRegistry.get(strategy, default=strategy) if on_cpu else strategy
    if not isinstance(known, DDPStrategy):
        return strategy
    entry = StrategyRegistry[strategy]
    return entry["strategy"](timeout=SILENCE, **entry["init_params"])


def _check_launch(trainer: Trainer, strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else type(trainer.strategy).__name__
    check_kind(trainer, name)
    launcher, started = trainer.strategy.launcher, _started_elsewhere(trainer)
    if isinstance(launcher, _MultiProcessingLauncher):
        if started:
            raise ConfigurationError(
                f"strategy {name} starts processes, and a launcher has started some already: use strategy='ddp'"
            )
        if trainer.num_nodes > 1:
            raise ConfigurationError(f"strategy {name} is for one machine: use strategy='ddp' and torchrun on each")
    elif isinstance(launcher, _SubprocessScriptLauncher) and trainer.world_size > 1 and not started:
        spawned = "" if isinstance(trainer.strategy, FSDPStrategy) else "use strategy='ddp_spawn', or "
        raise ConfigurationError(
            f"strategy {name} with {trainer.world_size} devices runs the whole program once more for each: "
            f"{spawned}start the program with torchrun --nproc_per_node={trainer.num_devices}"
        )
    place = Launched.here()
    if started and place is not None and not isinstance(trainer.strategy, SingleDeviceStrategy):
        _check_count(trainer, place)


def _check_count(trainer: Trainer, place: Launched) -> None:
    """Refuses a trainer that has not a device for each process."""
    devices = trainer.num_devices * trainer.num_nodes
    if devices != place.count:
        nodes = place.count // place.local_count
        machines = f", num_nodes={nodes}" if nodes > 1 else ""
        raise ConfigurationError(
            f"{place.count} processes were started, and the trainer has {devices} devices: "
            f"say devices={place.local_count}{machines} in its options, or start {devices}"
        )


def check_kind(trainer: Trainer, name: str) -> None:
    """Refuses strategies whose parameters cannot be gathered.

    Args:
        trainer: Has the strategy.
        name: What to call it.

    Raises:
        ConfigurationError: It is one.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        if not strategy.kwargs.get("use_orig_params", True):
            raise ConfigurationError(
                f"strategy {name} with use_orig_params=False trains arrays without names: leave it out"
            )
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ConfigurationError(
            f"strategy {name} divides the parameters among its devices in a way that is not gathered here: "
            "use strategy='fsdp' or 'ddp'"
        )


def _end(launcher: Any) -> None:
    """Ends what is left of the ranks, after an error or an interruption."""
    launcher.kill(signal.SIGKILL)
    for process in launcher.procs:
        process.join()


def _rank_failed(error: ProcessExitedException | ProcessRaisedException) -> WorkerError:
    rank = error.error_index
    if isinstance(error, ProcessRaisedException):
        return WorkerError(f"rank {rank} of the training failed: {str(error).strip().splitlines()[-1]}")
    how = f"was killed by {error.signal_name}" if error.signal_name else f"ended with exit code {error.exit_code}"
    return WorkerError(f"rank {rank} of the training {how} (exit code {error.exit_code}); the others were ended")


def forks(trainer: Trainer) -> bool:
    """Tells whether training will run in processes that are forked from this one."""
    return getattr(trainer.strategy.launcher, "_start_method", None) in ("fork", "forkserver")


def _started_elsewhere(trainer: Trainer) -> bool:
    """Tells whether a launcher such as torchrun or Slurm has started this process as one of several."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and bool(environment.creates_processes_externally)


def _local_rank() -> int | None:
    """Returns which of a launcher's processes on this machine this is; None without a launcher."""
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    return None if rank is None else int(rank)
