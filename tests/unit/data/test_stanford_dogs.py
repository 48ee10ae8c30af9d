from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from shoal.data import Dataset, Subset, stanford_dogs
from shoal.errors import ConfigurationError, DataError, MissingExtraError

BREEDS = {"n02085620-Chihuahua": 1, "n02085782-Japanese_spaniel": 2, "n02116738-African_hunting_dog": 120}
SHAPES = [(96, 64), (64, 96), (500, 375)]
"""Width and height."""


def picture(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    """Returns a coloured square in the middle, and white beside it."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = colour
    return Image.fromarray(pixels)


def cells(texts: list[str]) -> np.ndarray:
    column = np.empty((len(texts), 1), dtype=object)
    column[:, 0] = texts
    return column


def write(home: Path) -> None:
    """Writes three photographs a breed: two to train with and one to test."""
    lists = {"train": [], "test": []}
    for breed, label in BREEDS.items():
        (home / "Images" / breed).mkdir(parents=True)
        for number, (width, height) in enumerate(SHAPES):
            path = f"{breed}/{breed.partition('-')[0]}_{number}.jpg"
            picture(width, height, (label, 100, 200)).save(home / "Images" / path, quality=95)
            lists["test" if number == 1 else "train"].append((path, label))
    for part, entries in lists.items():
        paths, labels = zip(*entries, strict=True)
        columns = {"file_list": cells(list(paths)), "labels": np.array(labels, dtype=np.float64)[:, None]}
        savemat(home / f"{part}_list.mat", {**columns, "annotation_list": cells(list(paths))})


@pytest.fixture
def home(tmp_path):
    write(tmp_path)
    return tmp_path


def test_the_middle_of_each_photograph_is_read(home):
    train, test = stanford_dogs(data_dir=home, size=32)
    assert (len(train), len(test)) == (6, 3)
    assert train.targets().tolist() == [0, 0, 1, 1, 119, 119]
    assert test.known_targets().tolist() == [0, 1, 119]
    images, labels = train.take(np.array([5, 1, 0]))
    assert (images.shape, images.dtype, labels.dtype) == ((3, 3, 32, 32), np.uint8, np.int64)
    assert labels.tolist() == [119, 0, 0]
    for image, red in zip(images, (120, 1, 1), strict=True):
        inner = image[:, 2:-2, 2:-2].astype(int)  # a photograph's blocks blur what is beside the edge
        assert np.abs(inner - np.array([red, 100, 200])[:, None, None]).max() <= 12
    assert train.take(np.array([], dtype=np.int64))[0].shape == (0, 3, 32, 32)
    assert isinstance(train, Dataset)
    assert (train.classes, test.classes) == (120, 120)
    train.check()


def test_an_image_is_scaled_evenly(tmp_path):
    write(tmp_path)
    ramp = np.broadcast_to(np.linspace(0, 255, 640)[None, :, None], (480, 640, 3)).astype(np.uint8)
    path = tmp_path / "Images" / "n02085620-Chihuahua" / "n02085620_0.jpg"
    Image.fromarray(ramp).save(path, quality=95)
    image = stanford_dogs(data_dir=tmp_path, size=64)[0].take(np.array([0]))[0][0].astype(float)
    wanted = (80 + 480 * (np.arange(64) + 0.5) / 64) * 255 / 640
    assert np.abs(image - wanted).max() < 3


def test_images_of_other_modes_become_colours(home):
    path = home / "Images" / "n02085620-Chihuahua" / "n02085620_0.jpg"
    for mode in ("L", "CMYK"):
        Image.new(mode, (80, 60)).save(path)
        assert stanford_dogs(data_dir=home, size=16)[0].take(np.array([0]))[0].shape == (1, 3, 16, 16)
    Image.new("RGBA", (80, 60), (10, 20, 30, 0)).save(path, format="PNG")
    image = stanford_dogs(data_dir=home, size=16)[0].take(np.array([0]))[0][0]
    assert image[:, 8, 8].tolist() == [10, 20, 30]


def test_threads_and_other_processes_read_the_same(home):
    train, _ = stanford_dogs(data_dir=home, size=32)
    wanted = train.take(np.arange(6))[0]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda index: train.take(np.array([index % 6]))[0][0], range(48)))
    assert np.array_equal(np.stack(found), np.tile(wanted, (8, 1, 1, 1)))
    sent = pickle.loads(pickle.dumps(train))
    assert np.array_equal(sent.take(np.arange(6))[0], wanted)


def test_the_description_differs_where_the_data_do(home):
    train, test = stanford_dogs(data_dir=home, size=32)
    assert train.describe() == stanford_dogs(data_dir=home, size=32)[0].describe()
    other = [test.describe(), Subset(train, np.arange(5)).describe(), stanford_dogs(data_dir=home)[0].describe()]
    assert train.describe() not in other


def test_what_is_missing_is_named(home):
    (home / "test_list.mat").rename(home / "elsewhere.mat")
    with pytest.raises(DataError, match=r"lacks test_list.mat: unpack lists.tar of http://vision.stanford.edu"):
        stanford_dogs(data_dir=home)
    with pytest.raises(DataError, match=r"nowhere lacks the folder Images: unpack images.tar and lists.tar of http"):
        stanford_dogs(data_dir=home / "nowhere")
    with pytest.raises(ConfigurationError, match="size must be ≥ 1, not 0"):
        stanford_dogs(data_dir=home, size=0)


def test_missing_and_damaged_images_are_named(home):
    train, _ = stanford_dogs(data_dir=home)
    folder = home / "Images" / "n02085782-Japanese_spaniel"
    first, second = folder / "n02085782_0.jpg", folder / "n02085782_2.jpg"
    second.write_bytes(second.read_bytes()[:900])
    with pytest.raises(DataError, match=r"n02085782_2.jpg cannot be read: .*truncated"):
        train.take(np.array([3]))
    second.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"n02085782_2.jpg cannot be read: cannot identify"):
        train.take(np.array([3]))
    first.unlink()
    with pytest.raises(DataError, match=r"n02085782_0.jpg cannot be read: .*No such file"):
        train.take(np.array([2]))
    with pytest.raises(DataError, match=r"stanford_dogs: .*n02085782_0.jpg is missing"):
        train.check()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no list", "train_list.mat is damaged"),
        ({"labels": np.ones((2, 1))}, "train_list.mat is damaged: 'file_list'"),
        ({"file_list": cells(["a.jpg"]), "labels": np.ones((2, 1))}, "damaged: 1 files, but 2 labels"),
    ],
)
def test_damaged_lists_are_named(home, content, message):
    path = home / "train_list.mat"
    path.write_bytes(content) if isinstance(content, bytes) else savemat(path, content)
    with pytest.raises(DataError, match=message):
        stanford_dogs(data_dir=home)


def test_labels_out_of_range_are_refused(home):
    savemat(home / "train_list.mat", {"file_list": cells(["n02085620-Chihuahua/n02085620_0.jpg"]), "labels": [[121.0]]})
    with pytest.raises(DataError, match="stanford_dogs: sample 0 has a label outside 0 to 119"):
        stanford_dogs(data_dir=home)[0].check()


@pytest.mark.parametrize(("module", "package"), [("scipy.io", "scipy"), ("PIL.ImageOps", "pillow")])
def test_without_its_packages_it_gives_the_command(home, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is needed .* pip install 'shoal\[data\]'"):
        stanford_dogs(data_dir=home)
