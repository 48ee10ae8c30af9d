"""The windows of HAPT as a training takes them: people apart, channels normalised, and one of four modes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import shoal
from shoal.data import ArrayDataset
from shoal.data.catalogue.hapt import ACTIVITIES

VALIDATED = (7, 17, 27)
"""The subjects that early stopping and the choice of the best epoch look at. Neither trains nor tests on them."""

MODES = {
    "flatten": "each channel of a window is an example of its own, with the window's label",
    "average": "a window is the mean over its channels",
    "first": "a window is its first channel",
    "channels": "a window is all of its channels together",
}


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Examples of three groups of people; inputs float32 [n, channels, 128], targets int64 [n]."""

    train: ArrayDataset
    validation: ArrayDataset
    test: ArrayDataset

    @property
    def channels(self) -> int:
        """Signals of an example."""
        return int(self.train.inputs.shape[1])

    @property
    def classes(self) -> int:
        """Activities."""
        return len(ACTIVITIES)


def load(data_dir: Path | None, mode: str, *, subset: int | None, seed: int) -> Windows:
    """Returns the windows of UCI HAPT.

    Args:
        data_dir: Where the recordings lie; None for shoal's cache.
        mode: One of :data:`MODES`.
        subset: How many windows of each group to keep, drawn at random; None for all.
        seed: Decides which.

    Raises:
        DataError: There are no recordings.
    """
    others, test = shoal.data.hapt(data_dir=data_dir)
    validated = np.isin(np.asarray(others.ids), VALIDATED)
    known, unknown = others.take(np.flatnonzero(~validated)), others.take(np.flatnonzero(validated))
    mean, deviation = (of(known[0], axis=(0, 2), keepdims=True) for of in (np.mean, np.std))
    rng = np.random.default_rng(seed)
    parts = []
    for inputs, targets in (known, unknown, test.take(np.arange(len(test)))):
        kept = np.sort(rng.permutation(len(targets))[:subset])
        normal = (inputs[kept] - mean) / deviation
        parts.append(ArrayDataset(*in_mode(normal, targets[kept], mode), classes=len(ACTIVITIES), name=f"hapt, {mode}"))
    return Windows(train=parts[0], validation=parts[1], test=parts[2])


def in_mode(inputs: np.ndarray, targets: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns windows as a mode takes them.

    Args:
        inputs: Shape [n, channels, samples].
        targets: Shape [n].
        mode: One of :data:`MODES`.
    """
    count, channels, samples = inputs.shape
    if mode == "flatten":
        return inputs.reshape(count * channels, 1, samples), np.repeat(targets, channels)
    if mode == "average":
        return inputs.mean(axis=1, keepdims=True), targets
    return inputs[:, :1] if mode == "first" else inputs, targets
