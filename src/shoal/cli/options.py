"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.errors import ConfigurationError

Precision = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")]
Seed = Annotated[int | None, typer.Option(help="Decides all randomness.")]
DataDir = Annotated[Path | None, typer.Option(help="Where the data set's files lie, or are to be put.")]
RunDir = Annotated[Path | None, typer.Option(help="The run's folder; a new one under runs/ if left out.")]
Trackers = Annotated[
    list[str] | None, typer.Option("--tracker", help="mlflow or wandb, to follow the run as well; repeatable.")
]


def check_resume(resume: bool, run_dir: Path | None) -> None:
    """Refuses to go on with a run whose folder is not named."""
    if resume and run_dir is None:
        raise ConfigurationError("--resume goes on with a run's folder: name it with --run-dir")
