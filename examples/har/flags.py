"""The command line of ``main_multi_gpu.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from shoal.errors import ConfigurationError
from windows import MODES


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print together with the usage of forty flags."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; --help lists the flags")


def read(words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the flags.

    Args:
        words: The command line without the program; None: this program's.

    Raises:
        ConfigurationError: A flag is not known, or its value cannot be.
    """
    parser = _Parser(
        prog="main_multi_gpu.py",
        usage="%(prog)s [--multi-gpu {ddp,dp}] [flags]",
        description="Tells what people do from the sensors of a telephone, on one device or on several.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_devices(parser)
    _add_data(parser)
    _add_model(parser)
    _add_training(parser)
    _add_run(parser)
    asked = parser.parse_args(words)
    if asked.no_amp and asked.precision not in {"auto", "fp32"}:
        parser.error(f"--no-amp means fp32, and --precision {asked.precision} was given too: leave one out")
    if asked.no_amp:
        asked.precision = "fp32"
    return asked


def _add_devices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--multi-gpu", choices=("ddp", "dp"), help="ddp: started by torchrun, a process a device; None: one device"
    )
    group.add_argument("--gpu-ids", type=ids, metavar="0,1,…", help="which GPUs of this machine; None: the first ones")
    group.add_argument("--accelerator", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is")
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: on CUDA bf16 if the GPU has it, else fp16 with a scaled loss; on a CPU fp32, the faster there",
    )
    group.add_argument("--no-amp", action="store_true", help="no automatic mixed precision: as --precision fp32")
    # Launchers before torchrun gave it; the environment says the same.
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir", type=Path, help="where HAPT's recordings lie; None: where prepare_data.sh puts them"
    )
    modes = "; ".join(f"{name}: {meaning}" for name, meaning in MODES.items())
    group.add_argument("--mode", choices=MODES, default="flatten", help=modes)
    group.add_argument("--subset", type=positive, metavar="N", help="only N windows to train, validate and test on")
    group.add_argument(
        "--num-workers", type=count, default=0, help="processes a device that read ahead; windows in memory need none"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--encoder", choices=("vit", "cnn"), default="vit", help="what reads the signals")
    group.add_argument(
        "--encoder-path", type=Path, metavar="FILE", help="a pretrained encoder: safetensors, such as a run's model"
    )
    group.add_argument(
        "--freeze-encoder",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the head alone; without --encoder-path that is on random features",
    )
    group.add_argument(
        "--hidden-dims", type=positive, nargs="+", default=[512], metavar="N", help="hidden layers of the head"
    )
    group.add_argument("--dropout", type=share, default=0.1, help="in the encoder and in the head")
    group.add_argument("--vit-patch", type=positive, default=8, metavar="N", help="samples of a patch")
    group.add_argument("--vit-dim", type=positive, default=128, metavar="N", help="features of a patch")
    group.add_argument("--vit-depth", type=positive, default=4, metavar="N", help="layers")
    group.add_argument("--vit-heads", type=positive, default=4, metavar="N", help="heads of the attention")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, default=20, help="passes over the data")
    group.add_argument("--batch-size", type=positive, default=32, help="examples on each device, with ddp and dp alike")
    group.add_argument("--lr", type=rate, default=1e-3, help="learning rate after the warm-up")
    group.add_argument("--weight-decay", type=rate, default=1e-4, help="of AdamW")
    group.add_argument("--warmup-epochs", type=rate, default=2, help="in which the rate rises, step by step")
    group.add_argument("--grad-accum-steps", type=positive, default=1, help="batches on each device that make a step")
    group.add_argument("--max-grad-norm", type=rate, default=1.0, help="largest norm of the gradient; 0: no limit")
    group.add_argument(
        "--early-stopping-patience", type=count, default=7, help="epochs without a better validation; 0: go on"
    )
    group.add_argument("--seed", type=count, default=0, help="decides all randomness")


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--save-dir",
        "--run-dir",
        type=Path,
        default=Path("checkpoints/multi_gpu"),
        help="checkpoints, TensorBoard, report",
    )
    group.add_argument("--resume", action="store_true", help="go on with the run in --save-dir, exactly")
    group.add_argument("--log-interval", type=positive, default=50, help="steps between two looks at the loss")


def ids(text: str) -> list[int]:
    return [count(word) for word in text.split(",")]


def count(text: str) -> int:
    return int(_at_least(int(text), 0))


def positive(text: str) -> int:
    return int(_at_least(int(text), 1))


def rate(text: str) -> float:
    return _at_least(float(text), 0)


def share(text: str) -> float:
    value = rate(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def _at_least(value: float, least: int) -> float:
    if not least <= value < float("inf"):  # which NaN is not either
        raise argparse.ArgumentTypeError(f"{value} is not a number ≥ {least}")
    return value
