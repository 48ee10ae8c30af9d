"""The activity example, and recordings for it that take a moment to make and to read."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parents[1] / "examples" / "har"

SUBJECTS = (1, 2, 3, 4, 7, 9, 10, 12, 13, 17, 18, 20, 24, 27)
"""The nine who are tested on, the three who are validated on, and two to train on."""

SAMPLES = 192
"""Of one activity: two windows."""


def main():
    """Is ``main_multi_gpu.py``, in a process that has its arguments already."""
    sys.path.insert(0, str(EXAMPLE))
    runpy.run_path(str(EXAMPLE / "main_multi_gpu.py"), run_name="__main__")


def write_recordings(folder):
    """Writes recordings in HAPT's original files; activities differ in pace and posture, people in noise."""
    raw = folder / "RawData"
    raw.mkdir(parents=True)
    labels = []
    for number, subject in enumerate(SUBJECTS, 1):
        rng = np.random.default_rng(subject)
        parts = []
        for activity in range(1, 7):
            pace = np.sin(activity * np.arange(SAMPLES) / 9)[:, None] * rng.normal(1, 0.1, size=6)
            posture = np.array([0.9, 0.1 * activity, -0.1 * activity, 0, 0, 0])
            parts.append(pace * (activity < 4) + posture + rng.normal(scale=0.05, size=(SAMPLES, 6)))
            start = (activity - 1) * SAMPLES
            labels.append(f"{number} {subject} {activity} {start} {start + SAMPLES - 1}")
        signals = np.concatenate(parts)
        for sensor, columns in (("acc", slice(0, 3)), ("gyro", slice(3, 6))):
            np.savetxt(raw / f"{sensor}_exp{number:02d}_user{subject:02d}.txt", signals[:, columns], fmt="%.6f")
    (raw / "labels.txt").write_text("\n".join(labels) + "\n")
