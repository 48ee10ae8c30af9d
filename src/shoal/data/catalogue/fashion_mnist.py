"""Fashion-MNIST, in the original IDX files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from shoal.data.catalogue.download import data_home, fetch
from shoal.data.dataset import ArrayDataset
from shoal.errors import DataError, MissingDataError

SOURCE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
PACKAGE = "dataset-fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package ``dataset-fashion-mnist`` puts the files."""

FILES = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
"""The four files, and the published MD5 of each in its gzip form."""

MAGIC = {1: 0x0801, 3: 0x0803}
"""How an IDX file of unsigned bytes begins, by its number of dimensions."""


def fashion_mnist(*, data_dir: str | Path | None = None, download: bool = True) -> tuple[ArrayDataset, ArrayDataset]:
    """Returns Fashion-MNIST as training and test data: 60,000 and 10,000 images in 10 classes.

    Xiao et al., *Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms*, 2017.

    Args:
        data_dir: Where the four IDX files lie, gzipped or not; None to look where the Debian package
            ``dataset-fashion-mnist`` puts them, then in the cache.
        download: Whether to download what is in neither.

    Returns:
        Inputs uint8 [n, 1, 28, 28], targets int64 [n].

    Raises:
        DataError: A file is not there and cannot be downloaded, or is damaged.
        MissingDataError: One is not there, and ``download`` is False.
    """
    folders = [Path(data_dir)] if data_dir is not None else [DEBIAN, data_home("fashion-mnist")]
    paths = {name: _find(name, folders, download) for name in FILES}
    train, test = (
        ArrayDataset(
            read_idx(paths[f"{part}-images-idx3-ubyte"], dimensions=3)[:, None],
            read_idx(paths[f"{part}-labels-idx1-ubyte"], dimensions=1).astype(np.int64),
            classes=10,
            name="fashion_mnist",
        )
        for part in ("train", "t10k")
    )
    return train, test


def read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    """Returns the array of an IDX file of unsigned bytes, gzipped or not.

    Raises:
        DataError: The file is damaged or of another kind.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    head = 4 + 4 * dimensions
    if len(raw) < head or int.from_bytes(raw[:4]) != MAGIC[dimensions]:
        raise DataError(f"{path} is no IDX file of unsigned bytes with {dimensions} dimensions")
    shape = tuple(np.frombuffer(raw[4:head], dtype=">u4").tolist())
    if len(raw) - head != np.prod(shape):
        raise DataError(f"{path} is damaged: {len(raw) - head} bytes for an array of shape {shape}")
    # A copy, because torch keeps only arrays on a device that may be written.
    return np.frombuffer(raw, dtype=np.uint8, offset=head).reshape(shape).copy()


def _find(name: str, folders: list[Path], download: bool) -> Path:
    for folder in folders:
        for path in (folder / f"{name}.gz", folder / name):
            if path.exists():
                return path
    target = folders[-1] / f"{name}.gz"
    if not download:
        raise MissingDataError(f"there is no {target}: put it there, or install the Debian package {PACKAGE}")
    try:
        return fetch(f"{SOURCE}/{target.name}", target, md5=FILES[name])
    except DataError as error:
        raise DataError(f"{error}, or install the Debian package {PACKAGE}") from error
