"""Human activity recognition on one device or on several.

::

    python main_multi_gpu.py
    python main_multi_gpu.py --multi-gpu dp --gpu-ids 0,1
    torchrun --nproc_per_node=4 main_multi_gpu.py --multi-gpu ddp
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import torch
from torch.nn import functional as F

import flags
import shoal
import tested
import windows
from encoders import Classifier, classifier
from shoal.devices import Launched
from shoal.errors import ConfigurationError, ShoalError, Terminated, by_sigterm

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit codes."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code.

    Args:
        words: Without the program; None: this program's.
    """
    try:
        place = Launched.here()
        if place is None:  # a launcher ends its processes itself
            signal.signal(signal.SIGTERM, _terminate)
        train(flags.read(words), place)
    except (ShoalError, KeyboardInterrupt) as error:
        # Each process says it: a launcher may end the others before they can.
        rank = f"rank {place.rank}: " if place else ""
        sys.stdout.flush()  # in a file or a pipe, what was said before comes before
        print(f"main_multi_gpu.py: {rank}{str(error) or 'stopped'}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return TERMINATED if by_sigterm(error) else INTERRUPTED
        return REFUSED if isinstance(error, ConfigurationError) else FAILED
    return 0


def train(asked: argparse.Namespace, place: Launched | None) -> None:
    """Trains as the flags say, and tests the best model on people whom it has never seen.

    Args:
        asked: The flags.
        place: This process among those that a launcher has started.

    Raises:
        ConfigurationError: That cannot be.
    """
    devices = devices_of(asked, place)
    data = windows.load(asked.data_dir, asked.mode, subset=asked.subset, seed=asked.seed)
    build = model_of(asked, data)
    learner = learner_of(asked, build, devices)
    leads = place is None or place.rank == 0
    if leads:
        introduce(asked, build(), data)
    result = shoal.train(
        learner,
        data.train,
        epochs=asked.epochs,
        evaluate=data.validation,
        seed=asked.seed,
        name=f"human activity, {asked.encoder}, {asked.mode}",
        run_dir=asked.save_dir,
        resume=asked.resume,
        metric="loss",  # the accuracy on three people is soon as high as it gets
        patience=asked.early_stopping_patience or None,
        log_every=asked.log_interval,
        callbacks=[shoal.TrainingProgress()],
    )
    if leads:
        tested.report(learner, result, data.test, asked.save_dir)


def devices_of(asked: argparse.Namespace, place: Launched | None) -> shoal.Devices:
    """Returns the devices that the flags mean.

    Raises:
        ConfigurationError: They cannot be had in this way.
    """
    cuda = torch.cuda.device_count() if asked.accelerator != "cpu" and torch.cuda.is_available() else 0
    if asked.multi_gpu == "ddp" and place is None:
        raise ConfigurationError(
            "--multi-gpu ddp needs a process for each device: "
            f"torchrun --nproc_per_node={max(cuda, 2)} main_multi_gpu.py --multi-gpu ddp"
        )
    if asked.multi_gpu != "ddp" and place is not None and place.count > 1:
        raise ConfigurationError(f"{place.count} processes were started: add --multi-gpu ddp, or start one with python")
    if asked.accelerator == "cuda" and not cuda:
        raise ConfigurationError(f"--accelerator cuda: torch {torch.__version__} sees no CUDA device; leave it out")
    if asked.multi_gpu == "dp" and not cuda:
        raise ConfigurationError(
            "--multi-gpu dp needs CUDA devices, and there is none to use: "
            "torchrun --nproc_per_node=2 main_multi_gpu.py --multi-gpu ddp runs on a CPU too"
        )
    precision = asked.precision
    if precision == "auto":
        precision = (
            "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        )
    return shoal.Devices(
        asked.multi_gpu or "single", accelerator=asked.accelerator, ids=asked.gpu_ids, precision=precision
    )


def model_of(asked: argparse.Namespace, data: windows.Windows) -> partial[Classifier]:
    """Returns what makes the classifier that the flags mean."""
    return partial(
        classifier,
        asked.encoder,
        channels=data.channels,
        classes=data.classes,
        hidden=asked.hidden_dims,
        dropout=asked.dropout,
        frozen=asked.freeze_encoder,
        weights=asked.encoder_path and asked.encoder_path.resolve(),
        vit={name: getattr(asked, f"vit_{name}") for name in ("patch", "dim", "depth", "heads")},
    )


def learner_of(asked: argparse.Namespace, build: partial[Classifier], devices: shoal.Devices) -> shoal.TorchLearner:
    """Returns what trains it as the flags say."""
    return shoal.TorchLearner(
        build,
        loss=partial(F.cross_entropy, label_smoothing=0.1),
        optimizer=partial(torch.optim.AdamW, lr=asked.lr, weight_decay=asked.weight_decay),
        batch_size=asked.batch_size,
        accumulate=asked.grad_accum_steps,
        schedule=shoal.WarmupCosine(warmup_epochs=asked.warmup_epochs),
        clip_norm=asked.max_grad_norm or None,
        train_metrics=True,
        workers=asked.num_workers,
        devices=devices,
    )


def introduce(asked: argparse.Namespace, model: Classifier, data: windows.Windows) -> None:
    """Says what the flags amount to."""
    encoder, head = (sum(value.numel() for value in part.parameters()) for part in (model.encoder, model.head))
    frozen = ", frozen" if asked.freeze_encoder else ""
    print(f"model: {asked.encoder} with {encoder:,} parameters{frozen}, head with {head:,}")
    print(f"examples: {len(data.train):,} to train, {len(data.validation):,} to validate, {len(data.test):,} to test")
    print(f"mode {asked.mode}: {windows.MODES[asked.mode]}")
    if asked.freeze_encoder and asked.encoder_path is None:
        print(
            "warning: the encoder is frozen with random weights, and only the head learns; "
            "--no-freeze-encoder trains both, --encoder-path FILE gives it weights",
            file=sys.stderr,
        )


def _terminate(*_: object) -> NoReturn:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
