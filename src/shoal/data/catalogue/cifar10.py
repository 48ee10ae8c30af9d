"""CIFAR-10, in the original archive."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shoal.data.catalogue.download import data_home, fetch
from shoal.data.catalogue.unpickling import unpickle
from shoal.data.dataset import ArrayDataset
from shoal.errors import DataError, MissingDataError

ARCHIVE = "cifar-10-python.tar.gz"
SOURCE = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)


def cifar10(*, data_dir: str | Path | None = None, download: bool = True) -> tuple[ArrayDataset, ArrayDataset]:
    """Returns CIFAR-10 as training and test data: 50,000 and 10,000 images in 10 classes.

    Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.

    Args:
        data_dir: Where ``cifar-10-python.tar.gz``, or its unpacked folder ``cifar-10-batches-py``, lies or is to be
            put; None for the cache.
        download: Whether to download it where it is not there.

    Returns:
        Inputs uint8 [n, 3, 32, 32], targets int64 [n].

    Raises:
        DataError: The archive is not there and cannot be downloaded, or is damaged.
        MissingDataError: It is not there, and ``download`` is False.
    """
    home = data_home("cifar10") if data_dir is None else Path(data_dir)
    if (home / FOLDER).is_dir():
        read = _folder_reader(home / FOLDER)
    else:
        if not download and not (home / ARCHIVE).exists():
            raise MissingDataError(f"there is no CIFAR-10 in {home}: put {ARCHIVE} there, from {SOURCE}")
        read = _archive_reader(fetch(SOURCE, home / ARCHIVE, md5=MD5))
    train, test = (_dataset([_batch(name, read(name)) for name in names]) for names in (TRAIN, TEST))
    return train, test


def _folder_reader(folder: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read: {error.strerror}") from error

    return read


def _archive_reader(path: Path) -> Callable[[str], bytes]:
    try:
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.isfile()]
            content = {Path(member.name).name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error

    def read(name: str) -> bytes:
        if name not in content:
            raise DataError(f"{path} lacks {FOLDER}/{name}")
        return content[name]

    return read


def _batch(name: str, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = unpickle(io.BytesIO(raw), encoding="bytes")
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(batch[b"labels"], dtype=np.int64)
    except Exception as error:  # a damaged pickle may fail in any way
        raise DataError(f"CIFAR-10's {name} is damaged: {error}") from error
    return images, labels


def _dataset(batches: list[tuple[np.ndarray, np.ndarray]]) -> ArrayDataset:
    images, labels = zip(*batches, strict=True)
    return ArrayDataset(np.concatenate(images), np.concatenate(labels), classes=10, name="cifar10")
