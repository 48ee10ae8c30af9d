"""Stanford Dogs, in its original files."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.data.chunks import digest
from shoal.data.dataset import ArrayDataset
from shoal.errors import ConfigurationError, DataError, MissingExtraError

HOME_PAGE = "http://vision.stanford.edu/aditya86/ImageNetDogs"
CLASSES = 120
FOLDER = "Images"


def stanford_dogs(*, data_dir: str | Path, size: int = 128) -> tuple[ImageFiles, ImageFiles]:
    """Returns Stanford Dogs as training and test data: 12,000 and 8,580 photographs of 120 breeds.

    Khosla et al., *Novel Dataset for Fine-Grained Image Categorization*, 2011.

    Args:
        data_dir: Where ``train_list.mat``, ``test_list.mat`` and the folder ``Images`` lie.
        size: Height and width of an image, ≥ 1.

    Returns:
        Inputs uint8 [n, 3, size, size], decoded when they are asked for; targets int64 [n].

    Raises:
        DataError: A list or the folder is missing or damaged.
        MissingExtraError: scipy or pillow is not installed.
    """
    if size < 1:
        raise ConfigurationError(f"size must be ≥ 1, not {size}")
    data_dir = Path(data_dir)
    if not (data_dir / FOLDER).is_dir():
        raise DataError(
            f"{data_dir} lacks the folder {FOLDER}: unpack images.tar and lists.tar of {HOME_PAGE} (750 MB) there"
        )
    _require_packages()
    train, test = (
        ImageFiles(
            data_dir / FOLDER, *_listed(data_dir / f"{part}_list.mat"), size=size, classes=CLASSES, name="stanford_dogs"
        )
        for part in ("train", "test")
    )
    return train, test


class ImageFiles:
    """Photographs in files, decoded each time they are asked for, by any number of threads or processes.

    The largest square in an image's middle is scaled to the wanted size.

    Args:
        folder: Where the files are.
        paths: Their paths in there.
        labels: Their classes, from 0, shape [n].
        size: Height and width of what is read.
        classes: Number of classes.
        name: What messages and reports call the data.
    """

    def __init__(
        self, folder: Path, paths: Sequence[str], labels: np.ndarray, *, size: int, classes: int, name: str
    ) -> None:
        self.folder = folder
        self.paths = list(paths)
        self.size = size
        self.classes: int | None = classes
        self.name = name
        self._labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads the images; uint8 [n, 3, size, size] and int64 [n].

        Raises:
            DataError: An image is missing or damaged.
        """
        images = np.empty((len(indices), 3, self.size, self.size), dtype=np.uint8)
        for image, index in zip(images, indices, strict=True):
            image[...] = _square(self.folder / self.paths[index], self.size).transpose(2, 0, 1)
        return images, self._labels[indices]

    def targets(self) -> np.ndarray:
        """Returns the labels of all images."""
        return self._labels

    def known_targets(self) -> np.ndarray:
        """Returns the labels of all images."""
        return self._labels

    def check(self) -> None:
        """Makes sure that there are images, and that their files exist; they are decoded when they are trained on.

        Raises:
            DataError: There is none, a file is missing, or a label is out of range.
        """
        if len(self) == 0:
            raise DataError(f"{self.name}: there is no sample")
        for path in self.paths:
            if not (self.folder / path).is_file():
                raise DataError(f"{self.name}: {self.folder / path} is missing")
        ArrayDataset(self._labels, self._labels, classes=self.classes, name=self.name).check_labels()

    def describe(self) -> dict[str, Any]:
        """Returns the name, the number and size of the images, and a digest of their paths and labels."""
        contents = digest(np.asarray(self.paths), self._labels)
        return {"name": self.name, "samples": len(self), "size": self.size, "digest": contents}


def _require_packages() -> None:
    for package, module in (("scipy", "scipy.io"), ("pillow", "PIL.ImageOps")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtraError(package, purpose="read Stanford Dogs", extra="data") from error


def _listed(path: Path) -> tuple[list[str], np.ndarray]:
    """Returns a list's files and their classes from 0."""
    from scipy.io import loadmat

    if not path.exists():
        raise DataError(f"{path.parent} lacks {path.name}: unpack lists.tar of {HOME_PAGE} there")
    try:
        content = loadmat(path, variable_names=("file_list", "labels"))
        paths = [str(cell.item()) for cell in content["file_list"].ravel()]
        labels = content["labels"].ravel().astype(np.int64) - 1
    except Exception as error:  # a damaged file may fail in any way
        raise DataError(f"{path} is damaged: {error}") from error
    if len(paths) != len(labels):
        raise DataError(f"{path} is damaged: {len(paths)} files, but {len(labels)} labels")
    return paths, labels


def _square(path: Path, size: int) -> np.ndarray:
    """Returns the largest square in an image's middle, scaled; uint8 [size, size, 3]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG decoder can halve a large image for nearly nothing
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # a damaged image may fail in any way
        raise DataError(f"{path} cannot be read: {error}") from error
    return np.asarray(square)
