"""The trainings on images with TensorFlow: on the devices of one process, and with two workers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("tensorflow")

import pictures
import shoal
from image_runs import PROMISED, all_gone, below, code_of, launches, node, scripts_here
from pictures import assert_same, records
from process_table import eventually
from shoal.learners.keras_backend import keras, tf

pytestmark = pytest.mark.slow

MIRRORED = "train_tf_mirroredstrategy.py"
WORKERS = "train_tf_multiworker_mirroredstrategy.py"
CPU = ("--accelerator", "cpu")

# Adam divides a gradient by its own size, so where that is all rounding, so is the step: hence the small rate.
SHORT = (*CPU, "-e", "2", "-bs", "30", "-lr", "2e-5", "--no-augment")
LONG = (*CPU, "-e", "100000", "-bs", "30")
NOISE = ("I0000", "WARNING: All log messages before absl")
"""How lines begin that TensorFlow writes when it is imported."""


@pytest.fixture(scope="session")
def clothes(tmp_path_factory):
    """A folder in the format of Fashion-MNIST, with few images."""
    return pictures.write_clothes(tmp_path_factory.mktemp("clothes"))


@pytest.fixture
def dogs(tmp_path):
    """A folder in the format of Stanford Dogs, with three photographs of each of two breeds."""
    return pictures.write_dogs(tmp_path / "dogs")


@pytest.fixture
def run_here(monkeypatch, tmp_path):
    """Runs a script in this process; returns its exit code."""
    with mock.patch.dict(os.environ), scripts_here(monkeypatch, tmp_path) as run:
        yield run


@pytest.fixture
def launch(tmp_path):
    """Starts both workers in a folder of its own; what is left of them is killed at the end."""
    with launches("run_tf_mwms.sh", tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def mirrored(clothes, tmp_path_factory):
    """The runs of one process on one device and on two, by their number."""
    folder = tmp_path_factory.mktemp("mirrored")
    with pytest.MonkeyPatch.context() as patch, scripts_here(patch, folder) as run:
        for count in (1, 2):
            assert run(MIRRORED, clothes, *SHORT, "-n", count, "--run-dir", count) == 0
    return {count: folder / str(count) for count in (1, 2)}


def told_by(log):
    """Returns the lines of a log without TensorFlow's first ones."""
    return [line for line in log.read_text().splitlines() if not line.startswith(NOISE)]


def lines(path):
    """Returns how many lines of a file are whole; none where it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


class TestOneProcess:
    def test_two_devices_are_one_with_the_same_batch(self, mirrored):
        assert_same(mirrored[2], mirrored[1], atol=1e-5)
        assert records(mirrored[1])[0]["examples"] == 100

    def test_a_run_that_was_stopped_goes_on_exactly(self, run_here, clothes, mirrored, monkeypatch, capsys):
        words = (clothes, *SHORT, "-n", "2", "--run-dir", "parts")
        with monkeypatch.context() as patched:
            patched.setattr(shoal.TrainingProgress, "on_epoch_end", lambda *_: signal.raise_signal(signal.SIGINT))
            assert run_here(MIRRORED, *words) == 128 + signal.SIGINT
        assert capsys.readouterr().err.endswith(f"{MIRRORED}: stopped after step 4; the state is saved in parts\n")
        assert run_here(MIRRORED, *words, "--resume") == 0
        assert records(Path("parts")) == records(mirrored[2])
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (Path("parts"), mirrored[2]))
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])

    def test_dogs_are_read_from_their_folder_without_torch(self, run_here, dogs, capsys):
        before = set(sys.modules)
        assert run_here(MIRRORED, dogs, *CPU, "-e", "1", "-bs", "4", "-n", "2") == 0
        told = capsys.readouterr().out
        assert told.startswith(f"Stanford Dogs in {dogs}\nimages: 4 examples, 1 epochs, 1 steps")
        assert "batch: 2 examples a device × 2 devices = 4 a step (mirrored, fp32)" in told
        weights = load_file("runs/tf_mirrored/model.safetensors")
        assert any(array.shape[-1:] == (120,) for array in weights.values())
        assert "torch" not in set(sys.modules) - before

    def test_efficientnet_takes_a_step(self, run_here, clothes):
        words = (*CPU, "-e", "1", "-bs", "2", "-n", "1", "--subset", "2", "--model", "efficientnet-b2")
        tf.config.run_functions_eagerly(True)  # its graph takes half a minute to make
        try:
            assert run_here(MIRRORED, clothes, *words) == 0
        finally:
            tf.config.run_functions_eagerly(False)
        weights = load_file("runs/tf_mirrored/model.safetensors")
        assert sum(array.size for name, array in weights.items() if "top_conv" in name) == 352 * 1408


def test_augmentation_is_for_training_alone(run_here):
    from images_tf import compiled

    settings = {"size": 8, "channels": 3, "classes": 2, "learning_rate": 0.1}
    model = compiled("small", augment=True, **settings)
    names = [layer.name for layer in model.layers]
    assert not any("random" in layer.name for layer in compiled("small", augment=False, **settings).layers)
    last = max(place for place, name in enumerate(names) if "random" in name)
    changed = keras.Model(model.input, model.layers[last].output)
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
    scaled = images.transpose(0, 2, 3, 1) / np.float32(255)
    np.testing.assert_allclose(changed(images, training=False), scaled, atol=1e-6)
    augmented = np.asarray(changed(images, training=True))
    assert 0 <= augmented.min() < augmented.max() <= 1
    mirrored = [
        np.corrcoef(new.ravel(), old[:, ::-1].ravel())[0, 1] > 0.9 for new, old in zip(augmented, scaled, strict=True)
    ]
    assert 16 < sum(mirrored) < 48


class TestRefusals:
    @pytest.mark.parametrize(
        ("gpus", "words", "message"),
        [
            (0, ("-n", "0", *CPU), "argument -n/--n-gpus: 0 is not at least 1"),
            (0, ("-bs", "7", "-n", "2", *CPU), "-bs 7 cannot be divided among 2 devices: use -bs 6 or -bs 8"),
            (0, ("nowhere", *CPU), "there is no folder nowhere: leave it out to train on Fashion-MNIST"),
            (
                0,
                ("--model", "vgg", *CPU),
                "argument --model: invalid choice: 'vgg' (choose from 'small', 'efficientnet-b2')",
            ),
            (
                0,
                ("--resume", "-n", "2", *CPU),
                "there is no run to resume in runs/tf_mirrored; leave --resume out to begin one",
            ),
            (
                0,
                (),
                "-n 8 GPUs were asked for, and TensorFlow sees none: use --accelerator cpu for as many logical ones",
            ),
            (2, (), "-n 8 GPUs were asked for, and there are 2: use -n 2"),
        ],
    )
    def test_by_one_process(self, run_here, monkeypatch, clothes, capsys, gpus, words, message):
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda _=None: ["GPU"] * gpus)
        data = () if "nowhere" in words else (clothes,)
        assert run_here(MIRRORED, *data, *words) == 2
        assert capsys.readouterr().err == f"{MIRRORED}: error: {message}\n"

    @pytest.mark.parametrize(
        ("gpus", "words", "message"),
        [
            (0, (), "nothing says where the workers are: use ./run_tf_mwms.sh for two on this machine"),
            (0, ("--workers", "a:1,b"), "--workers a:1,b must be HOST:PORT,HOST:PORT, and 'b' is not HOST:PORT"),
            (0, ("--workers", "a:1,a:1"), "--workers a:1,a:1 has a:1 twice: each worker needs a port of its own"),
            (0, ("--workers", "a:1"), "-wi 1 is not among the 1 workers: use 0 to 0"),
            (0, ("--workers", "a:1,a:2", "-n", "1", *CPU), "-n 1 is a number of GPUs, and a CPU is one device"),
            (0, ("--workers", "a:1,a:2", "-n", "1"), "-n 1 GPUs were asked for, and this worker sees 0: leave -n out"),
            (2, ("--workers", "a:1,a:2", "-n", "3"), "-n 3 GPUs were asked for, and this worker sees 2: use -n 2"),
            (2, ("--workers", "a:1,a:2", "-bs", "6"), "-bs 6 cannot be divided among 4 devices: use -bs 4 or -bs 8"),
            (2, ("--workers", "a:1,a:2", "-bs", "1", "-n", "1"), "-bs 1 is the batch of all 2 devices together"),
        ],
    )
    def test_by_a_worker(self, run_here, monkeypatch, clothes, capsys, gpus, words, message):
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda _=None: ["GPU"] * gpus)
        assert run_here(WORKERS, clothes, "-wi", "1", *words) == 2
        told = capsys.readouterr()
        assert told.err.startswith(f"{WORKERS}: worker 1: error: {message}")
        assert told.err.count("\n") == 1
        assert told.out == ""

    def test_of_a_worker_without_an_index(self, run_here, capsys):
        assert run_here(WORKERS) == 2
        needed = "the following arguments are required: -wi/--worker-index"
        assert capsys.readouterr().err == f"{WORKERS}: error: {needed}\n"

    def test_of_other_words_for_the_same(self, run_here, capsys, monkeypatch):
        monkeypatch.setenv("TF_CONFIG", "{}")
        assert run_here(WORKERS, "-wi", "0", "--workers", "a:1,a:2") == 2
        assert "error: TF_CONFIG is set, and this script makes it" in capsys.readouterr().err


class TestTwoWorkers:
    def test_two_runs_at_once_end_where_one_process_does(self, launch, clothes, mirrored, tmp_path):
        folders = [tmp_path / name for name in ("first", "second")]
        processes = [launch(clothes, *SHORT, folder=folder) for folder in folders]
        for process, folder in zip(processes, folders, strict=True):
            assert code_of(process) == 0, (folder / "said").read_text()
            assert_same(folder / "runs/tf_multiworker", mirrored[2], atol=1e-5)
            logs = [folder / f"job_tf_mwms_{index}.log" for index in (0, 1)]
            assert "batch: 15 examples a device × 2 devices = 30 a step (multiworker, fp32)" in told_by(logs[0])
            assert told_by(logs[0])[-1].startswith("finished after ")
            assert told_by(logs[1]) == []
            assert (folder / "said").read_text() == logs[0].read_text()
            assert {path.name for path in folder.iterdir()} == {"runs", "said", *(log.name for log in logs)}

    def test_one_that_is_killed_ends_the_other_and_a_resumed_run_goes_on_until_ctrl_c(self, launch, clothes, tmp_path):
        metrics = tmp_path / "runs/tf_multiworker/metrics.jsonl"
        process = launch(clothes, *LONG)
        assert eventually(lambda: lines(metrics), 90)
        everyone = below(process.pid)
        os.kill(node(process, "--worker-index", "1"), signal.SIGKILL)
        assert code_of(process, PROMISED) == 128 + signal.SIGKILL
        told = (tmp_path / "said").read_text()
        assert "run_tf_mwms.sh: worker 1 failed with code 137; its log is job_tf_mwms_1.log" in told
        assert all_gone(everyone)

        done = lines(metrics)
        process = launch(clothes, *LONG, "--resume")
        assert eventually(lambda: lines(metrics) > done, 90)
        everyone = below(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert code_of(process, PROMISED) == 128 + signal.SIGINT
        assert all_gone(everyone)
        assert [line["epoch"] for line in records(metrics.parent)] == [*range(1, lines(metrics) + 1)]


FAKE = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec {python} "$@"; fi
echo "$CUDA_VISIBLE_DEVICES|$TF_NUM_INTRAOP_THREADS|$WORKERS|$*"
"""
"""Stands in for Python, and shows how the workers were called."""


class TestTheLauncher:
    @pytest.fixture
    def fake(self, tmp_path):
        path = tmp_path / "python"
        path.write_text(FAKE.replace("{python}", sys.executable))
        path.chmod(0o755)
        return {"PYTHON": str(path)}

    def test_the_workers_get_the_arguments_and_half_of_the_gpus_each(self, launch, fake, tmp_path):
        assert launch("some folder", "-bs", 64, CUDA_VISIBLE_DEVICES="0,2,4,6,7", **fake).wait(20) == 0
        shown = [(tmp_path / f"job_tf_mwms_{index}.log").read_text().strip().split("|") for index in (0, 1)]
        assert [visible for visible, *_ in shown] == ["0,2", "4,6"]
        assert len({workers for *_, workers, _ in shown}) == 1
        addresses = shown[0][2].split(",")
        assert len({*addresses}) == 2
        assert all(address.startswith("127.0.0.1:") for address in addresses)
        for index, (*_, words) in enumerate(shown):
            assert words.endswith(f"{WORKERS} --worker-index {index} some folder -bs 64")

    def test_without_gpus_the_cores_are_divided(self, launch, fake, tmp_path):
        assert launch(*CPU, CUDA_VISIBLE_DEVICES="0", OMP_NUM_THREADS="", **fake).wait(20) == 0
        visible, threads, *_ = (tmp_path / "job_tf_mwms_1.log").read_text().split("|")
        assert (visible, threads) == ("0", str(max(len(os.sched_getaffinity(0)) // 2, 1)))

    @pytest.mark.parametrize(
        ("words", "environment", "message"),
        [
            ((), {"CUDA_VISIBLE_DEVICES": "3"}, "2 workers need a GPU each, and there is 1: use --accelerator cpu"),
            (("-wi", "1"), {}, "-wi or --workers is given, and this starts both workers, on this machine; for others"),
            (("--workers=a:1",), {}, "-wi or --workers is given, and this starts both workers"),
            ((), {"WORKERS": "a:1,b:1"}, "WORKERS=a:1,b:1 is set, and this starts both workers"),
            ((), {"TF_CONFIG": "{}"}, "TF_CONFIG is set, and this starts both workers"),
        ],
    )
    def test_what_cannot_be_is_refused(self, launch, fake, tmp_path, words, environment, message):
        assert launch(*words, **fake, **environment).wait(20) == 2
        told = (tmp_path / "said").read_text()
        assert told.startswith(f"run_tf_mwms.sh: error: {message}")
        assert told.count("\n") == 1
        assert not [*tmp_path.glob("job*")]
