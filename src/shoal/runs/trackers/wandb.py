"""Weights & Biases."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.runs.folder import RunData
from shoal.runs.trackers.process import Ending


class WandbTracker:
    """Writes to ``wandb/`` in the run's folder, and nowhere else unless ``$WANDB_MODE`` says online.

    ``wandb sync RUN/wandb/offline-run-*`` uploads it later. The run's name is its folder's, and ``$WANDB_PROJECT`` or
    the configuration's name is the project. NaN stays NaN, and what was infinite is NaN too.

    A resumed run goes on with the same id, offline in a further folder with that id, which ``wandb sync`` joins to the
    first in the order of their times. What was written already is not written again: W&B would drop a step below the
    last. Rounds between the checkpoint and the crash so keep the values of the first time. The library holds much back
    until it is closed; a folder whose process was killed before is therefore removed and written anew.

    Args:
        run: The run.
        known: What was remembered of it: ``id``, and under ``part`` a folder that was not closed; or nothing.
    """

    lasting = False

    def __init__(self, run: RunData, known: Mapping[str, Any]) -> None:
        import wandb

        offline = os.environ.get("WANDB_MODE") == "offline"
        if str(known.get("part", "")).startswith("offline-run-"):
            shutil.rmtree(run.path / "wandb" / Path(known["part"]).name, ignore_errors=True)
        name = str(known.get("id") or uuid.uuid4().hex[:8])
        own = str(run.config.get("identity", {}).get("name") or run.name)
        settings = wandb.Settings(
            silent=True,
            console="off",  # the run's own output is not this process's, and neither is what the machine does
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            dir=str(run.path),
            project=os.environ.get("WANDB_PROJECT") or re.sub(r"[/\\#?%:]", "_", own)[:128],
            name=run.name,
            id=name,
            resume="allow" if known and not offline else None,
            settings=settings,
        )
        self.known = {"id": name, "part": Path(self._run.dir).parent.name if offline else ""}

    def describe(self, config: Mapping[str, Any]) -> None:
        """Takes the configuration."""
        self._run.config.update(dict(config), allow_val_change=True)

    def log(self, number: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one round or epoch, which is their step."""
        self._run.log(dict(metrics), step=number, commit=True)

    def close(self, ending: Ending) -> None:
        """Says how the run ended, and waits until everything is written."""
        self._run.finish(exit_code=int(ending != "finished"))
        self.known["part"] = ""
