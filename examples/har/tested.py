"""What a trained model does on people whom it has never seen, activity by activity."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import shoal
from shoal.data.catalogue.hapt import ACTIVITIES
from shoal.training.classes import class_reports

BATCH = 512
FILE = "test.json"


def report(learner: shoal.TorchLearner, result: shoal.TrainingResult, data: shoal.data.ArrayDataset, to: Path) -> None:
    """Prints the accuracy and each activity's precision and recall, and writes them to a file.

    Args:
        learner: Has trained the model.
        result: Holds it.
        data: What to test it on.
        to: The folder of the file.
    """
    table = confusion(learner, result, data)
    classes = class_reports(table)
    accuracy = float(np.trace(table) / table.sum())
    print(f"\ntest: accuracy {accuracy:.4f} on {len(data):,} examples of people whom the model has never seen")
    print(f"{'activity':<20}{'precision':>11}{'recall':>11}{'f1':>11}{'examples':>11}")
    for name, of in zip(ACTIVITIES, classes, strict=True):
        print(f"{name:<20}{of.precision:>11.3f}{of.recall:>11.3f}{of.f1:>11.3f}{of.examples:>11,}")
    rows = [{"activity": name, **asdict(of)} for name, of in zip(ACTIVITIES, classes, strict=True)]
    told = {"accuracy": accuracy, "examples": len(data), "classes": rows}
    temporary = to / f".{FILE}"
    temporary.write_text(json.dumps(told, indent=2) + "\n")
    temporary.replace(to / FILE)


@torch.no_grad()
def confusion(learner: shoal.TorchLearner, result: shoal.TrainingResult, data: shoal.data.ArrayDataset) -> np.ndarray:
    """Returns how many examples of each class were taken for which, int64 [classes, classes]."""
    model = learner.model()
    model.load_state_dict(result.params)
    model.to(learner.device).eval()
    taken = []
    for start in range(0, len(data), BATCH):
        inputs, _ = data.take(np.arange(start, min(start + BATCH, len(data))))
        with learner.autocast():
            taken.append(model(torch.as_tensor(inputs).to(learner.device)).argmax(dim=1).cpu().numpy())
    cells = data.targets() * len(ACTIVITIES) + np.concatenate(taken)
    return np.bincount(cells, minlength=len(ACTIVITIES) ** 2).reshape(len(ACTIVITIES), -1)
