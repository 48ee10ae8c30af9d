"""Small image data in the original formats, for the examples that train on them, and what came of it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy.io import savemat

from shoal.data.catalogue.cifar10 import FOLDER, TEST, TRAIN

EXAMPLE = Path(__file__).parents[1] / "examples" / "images"


def write_clothes(folder):
    """Writes 100 images to train on and 33 to test with, in ten classes, as Fashion-MNIST is; returns the folder."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 100), ("t10k", 33)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), labels + 9] = 255
        _write_idx(folder / f"{part}-images-idx3-ubyte", images)
        _write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder


def _write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    path.write_bytes(head + array.tobytes())


def write_cifar10(folder):
    """Writes 400 images to train on and 80 to test with, of ten patterns under noise, as CIFAR-10 is."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(256, size=(10, 3, 2, 2)).repeat(16, axis=2).repeat(16, axis=3).reshape(10, 3072)
    (folder / FOLDER).mkdir()
    for name in (*TRAIN, *TEST):
        labels = np.arange(80) % 10
        pixels = np.clip(patterns[labels] + rng.normal(0, 30, size=(80, 3072)), 0, 255).astype(np.uint8)
        (folder / FOLDER / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2))
    return folder


def write_dogs(folder):
    """Writes four photographs to train on and two to test with, of two breeds, as Stanford Dogs are."""
    for part, names in (("train", ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")), ("test", ("a/3.jpg", "b/3.jpg"))):
        for name in names:
            path = folder / "Images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (150, 140), (200, 20, 20) if name[0] == "a" else (20, 20, 200)).save(path)
        labels = np.array([[1 if name[0] == "a" else 120] for name in names])
        savemat(folder / f"{part}_list.mat", {"file_list": np.array(names, dtype=object)[:, None], "labels": labels})
    return folder


def records(run):
    """Returns what a run has recorded of its epochs, without what differs from run to run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("epoch", "step", "examples", "train_loss", "train_accuracy", "loss", "accuracy")
    return [{name: line[name] for name in kept} for line in lines]


def assert_same(run, expected, atol=1e-6):
    """Asserts that two runs ended with the same model, and measured the same after every epoch."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, expected))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)
    for line, wanted in zip(records(run), records(expected), strict=True):
        assert line == pytest.approx(wanted, rel=0, abs=atol)
