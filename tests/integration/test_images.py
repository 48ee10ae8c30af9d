"""The trainings on images: on one node and on two, on this machine and on two hosts, in both formats."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import pictures
import shoal
from hosts import NEEDED
from image_runs import PROMISED, all_gone, below, code_of, launches, node, scripts_here
from launches import free_port, wait_for, wait_for_lines
from pictures import EXAMPLE, assert_same, records

# Adam divides a gradient by its own size, so where that is all rounding, so is the step: hence the small rate.
SHORT = ("-e", "2", "-bs", "30", "-lr", "2e-5", "--accelerator", "cpu", "--no-augment")
LONG = ("-e", "100000", "-bs", "30", "--accelerator", "cpu")


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
    with scripts_here(monkeypatch, tmp_path) as run:
        yield run


@pytest.fixture
def launch(tmp_path):
    """Starts the two-node script in a folder of its own; what is left of it is killed at the end."""
    with launches("run_torch_ddp.sh", tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def one_process(clothes, tmp_path_factory):
    """The run of one process without a launcher."""
    folder = tmp_path_factory.mktemp("one")
    words = [sys.executable, "-W", "error", EXAMPLE / "train_torch_ddp.py", clothes, *SHORT]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"no Stanford Dogs in {clothes}: training on Fashion-MNIST\n")
    assert done.stdout.splitlines()[-1].startswith("finished after ")
    return folder / "runs/torch_ddp"


@pytest.mark.slow
class TestTwoNodes:
    def test_they_end_where_one_process_does(self, launch, clothes, one_process, tmp_path):
        process = launch(clothes, *SHORT)
        assert code_of(process) == 0, (tmp_path / "said").read_text()
        assert_same(tmp_path / "runs/torch_ddp", one_process)
        logs = [(tmp_path / f"job_torch_ddp_{rank}.log").read_text() for rank in (0, 1)]
        assert "batch: 15 examples a device × 2 devices = 30 a step (ddp, fp32)" in logs[0]
        assert logs[0].splitlines()[-1].startswith("finished after ")
        assert logs[1] == ""
        assert (tmp_path / "said").read_text() == logs[0]

    def test_one_that_is_killed_ends_the_other(self, launch, clothes, tmp_path):
        process = launch(clothes, *LONG)
        wait_for_lines(tmp_path / "runs/torch_ddp", 1)
        everyone = below(process.pid)
        os.kill(node(process, "--node-rank=1"), signal.SIGKILL)
        assert code_of(process, PROMISED) == 128 + signal.SIGKILL
        told = (tmp_path / "said").read_text()
        assert "run_torch_ddp.sh: node 1 failed with code 137; its log is job_torch_ddp_1.log" in told
        assert all_gone(everyone)

    def test_ctrl_c_ends_all(self, launch, clothes, tmp_path):
        process = launch(clothes, *LONG)
        wait_for_lines(tmp_path / "runs/torch_ddp", 1)
        everyone = below(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert code_of(process, PROMISED) == 128 + signal.SIGINT
        assert "train_torch_ddp.py: rank 0: stopped after step" in (tmp_path / "job_torch_ddp_0.log").read_text()
        assert all_gone(everyone)


@pytest.mark.slow
class TestTwoHosts:
    pytestmark = NEEDED

    @pytest.fixture
    def both(self, launch, hosts, tmp_path):
        """Starts a node on each host; returns the processes and the folders that they run in."""
        port = str(free_port())
        folders = [tmp_path / host.name for host in hosts]

        def start(*words):
            place = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": port}
            pairs = enumerate(zip(hosts, folders, strict=True))
            return [
                launch(*words, host=host, folder=folder, NODE_RANK=str(rank), **place) for rank, (host, folder) in pairs
            ]

        return start, folders

    def test_they_end_where_one_process_does(self, both, clothes, one_process):
        start, folders = both
        codes = [code_of(process) for process in start(clothes, *SHORT)]
        told = [(folder / "said").read_text() for folder in folders]
        assert codes == [0, 0], told
        assert_same(folders[0] / "runs/torch_ddp", one_process)
        assert "2 devices = 30 a step" in told[0]
        assert sorted(path.name for path in folders[1].iterdir()) == ["job_torch_ddp_1.log", "said"]

    def test_the_other_host_ends_when_one_is_lost(self, both, hosts, clothes):
        start, folders = both
        left, _ = start(clothes, *LONG)
        wait_for_lines(folders[0] / "runs/torch_ddp", 1)
        hosts[1].kill()
        assert code_of(left, PROMISED) == 1
        assert "\ntrain_torch_ddp.py: rank 0: error: another rank is gone" in (folders[0] / "said").read_text()


FAKE = """#!/usr/bin/env bash
echo "$CUDA_VISIBLE_DEVICES|$OMP_NUM_THREADS|$*"
case "$*" in *--node-rank=1*) eval "${NODE_1:-}" ;; *) eval "${NODE_0:-}" ;; esac
"""
"""Stands in for Python, and shows how it was called."""


class TestTheLauncher:
    @pytest.fixture
    def fake(self, tmp_path):
        path = tmp_path / "python"
        path.write_text(FAKE)
        path.chmod(0o755)
        return {"PYTHON": str(path), "MASTER_PORT": "29500"}

    @staticmethod
    def shown(folder, rank):
        """Returns the devices, the threads, and the words."""
        return (folder / f"job_torch_ddp_{rank}.log").read_text().splitlines()[0].split("|")

    def test_the_nodes_get_the_arguments_and_half_of_the_gpus_each(self, launch, fake, tmp_path):
        process = launch("some folder", "-bs", 64, CUDA_VISIBLE_DEVICES="0,2,4,6,7", **fake)
        assert process.wait(10) == 0
        for rank, devices in enumerate(["0,2", "4,6"]):
            visible, _, words = self.shown(tmp_path, rank)
            assert visible == devices
            assert f"--nnodes=2 --node-rank={rank} --nproc-per-node=2 --master-addr=127.0.0.1" in words
            assert words.endswith("train_torch_ddp.py some folder -bs 64")

    def test_on_a_cpu_there_is_a_process_a_node_and_the_cores_are_divided(self, launch, fake, tmp_path):
        launch("--accelerator", "cpu", CUDA_VISIBLE_DEVICES="0", OMP_NUM_THREADS="", **fake).wait(10)
        visible, threads, words = self.shown(tmp_path, 1)
        assert (visible, threads) == ("0", str(max(len(os.sched_getaffinity(0)) // 2, 1)))
        assert "--nproc-per-node=1" in words

    def test_node_rank_starts_that_node_only(self, launch, fake, tmp_path):
        process = launch(NODE_RANK="2", NNODES="3", NPROC="4", MASTER_ADDR="10.0.0.9", CUDA_VISIBLE_DEVICES="", **fake)
        assert process.wait(10) == 0
        assert "--nnodes=3 --node-rank=2 --nproc-per-node=4 --master-addr=10.0.0.9" in self.shown(tmp_path, 2)[2]
        assert not (tmp_path / "job_torch_ddp_0.log").exists()
        assert (tmp_path / "said").read_text() == (tmp_path / "job_torch_ddp_2.log").read_text()

    @pytest.mark.parametrize(
        ("failed", "says", "told"),
        [
            (0, "echo train_torch_ddp.py: rank 3: error: why; echo more", "train_torch_ddp.py: rank 3: error: why\n"),
            (1, "echo 'SomeError: why'; echo ====", "SomeError: why\n"),
        ],
    )
    def test_a_failure_of_either_is_returned_when_the_other_has_ended(self, launch, fake, tmp_path, failed, says, told):
        ends = {f"NODE_{failed}": f"{says}; exit 7", f"NODE_{1 - failed}": "sleep 60"}
        process = launch(CUDA_VISIBLE_DEVICES="", **ends, **fake)
        wait_for(lambda: len(below(process.pid)) > 1)
        everyone = below(process.pid)
        assert code_of(process, PROMISED) == 7
        first = f"run_torch_ddp.sh: node {failed} failed with code 7; its log is job_torch_ddp_{failed}.log\n"
        assert first + told in (tmp_path / "said").read_text()
        assert all_gone(everyone)

    def test_it_waits_for_both(self, launch, fake):
        started = time.monotonic()
        assert launch(CUDA_VISIBLE_DEVICES="", NODE_1="sleep 1", **fake).wait(10) == 0
        assert time.monotonic() - started > 1

    def test_a_node_deaf_to_sigterm_is_killed(self, launch, fake, tmp_path):
        process = launch(CUDA_VISIBLE_DEVICES="", NODE_0="trap '' TERM; while :; do sleep 1; done", **fake)
        wait_for(lambda: (tmp_path / "said").exists() and "|" in (tmp_path / "said").read_text())
        everyone = below(process.pid)
        process.send_signal(signal.SIGTERM)
        assert code_of(process, PROMISED) == 128 + signal.SIGTERM
        assert all_gone(everyone)

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            ({"NODE_RANK": "2", "MASTER_ADDR": "h"}, "NODE_RANK=2 is not among 0 to 1"),
            ({"NODE_RANK": "one", "MASTER_ADDR": "h"}, "NODE_RANK=one is not among 0 to 1"),
            ({"NODE_RANK": "1"}, "NODE_RANK=1 is for several machines: set MASTER_ADDR to that of node 0"),
            ({"MASTER_ADDR": "h"}, "MASTER_ADDR=h is for several machines: set NODE_RANK too, or unset it"),
            ({"NNODES": "0"}, "NNODES=0 is no number of nodes: leave it out for 2"),
            ({"NPROC": "all"}, "NPROC=all is no number of processes: leave it out for one a GPU"),
            ({"CUDA_VISIBLE_DEVICES": "3"}, "2 × 1 processes need as many GPUs, and there are 1"),
        ],
    )
    def test_what_cannot_be_is_refused(self, launch, fake, tmp_path, environment, message):
        assert launch(**fake, **environment).wait(10) == 2
        told = (tmp_path / "said").read_text()
        assert told.startswith(f"run_torch_ddp.sh: error: {message}")
        assert told.count("\n") == 1
        assert not [*tmp_path.glob("job*")]


def test_dogs_are_read_from_their_folder(run_here, dogs, capsys):
    assert run_here("train_torch_ddp.py", dogs, "-e", "1", "-bs", "4", "--accelerator", "cpu") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"Stanford Dogs in {dogs}\nimages: 4 examples, 1 epochs, 1 steps")
    weights = load_file("runs/torch_ddp/model.safetensors")
    assert [array.shape[0] for array in weights.values()][-1] == 120


def test_a_run_that_was_stopped_goes_on_exactly(run_here, clothes, monkeypatch, capsys):
    words = (clothes, "-e", "2", "-bs", "16", "--subset", "40", "--accelerator", "cpu", "--run-dir")
    assert run_here("train_torch_ddp.py", *words, "whole") == 0
    with monkeypatch.context() as patched:
        patched.setattr(shoal.TrainingProgress, "on_epoch_end", lambda *_: signal.raise_signal(signal.SIGINT))
        assert run_here("train_torch_ddp.py", *words, "parts") == 128 + signal.SIGINT
    assert capsys.readouterr().err == "train_torch_ddp.py: stopped after step 3; the state is saved in parts\n"
    assert run_here("train_torch_ddp.py", *words, "parts", "--resume") == 0
    assert records(Path("parts")) == records(Path("whole"))
    assert records(Path("whole"))[0]["examples"] == 40
    ours, theirs = (load_file(f"{folder}/model.safetensors") for folder in ("parts", "whole"))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_ctrl_c_before_the_first_step_is_one_line_too(run_here, clothes, monkeypatch, capsys):
    monkeypatch.setattr(shoal.data, "fashion_mnist", lambda **_: signal.raise_signal(signal.SIGINT))
    assert run_here("train_torch_ddp.py", clothes, "--accelerator", "cpu") == 128 + signal.SIGINT
    assert capsys.readouterr().err == "train_torch_ddp.py: stopped before the first step\n"


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").exists(), reason="no dataset-fashion-mnist")
def test_without_a_folder_it_is_fashion_mnist(run_here, tmp_path, capsys):
    words = ("-e", "1", "-bs", "64", "--subset", "64", "--accelerator", "cpu")
    for folder, found in (((), "no datadir"), ((tmp_path,), f"no Stanford Dogs in {tmp_path}")):
        assert run_here("train_torch_ddp.py", *folder, *words, "--run-dir", found.replace("/", "-")) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"{found}: training on Fashion-MNIST\nimages: 64 examples")


def test_augmentation_is_for_training_alone_and_seeded(run_here, clothes, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    from images_torch import Augment

    torch.manual_seed(0)
    images, augment = torch.rand(64, 3, 8, 8), Augment()
    assert augment.eval()(images) is images
    torch.manual_seed(1)
    first = augment.train()(images)
    torch.manual_seed(1)
    assert torch.equal(first, augment(images))
    assert not torch.equal(first, augment(images))
    assert first.shape == images.shape
    assert 0 <= first.min() < first.max() <= 1
    mirrored = [
        float(torch.corrcoef(torch.stack([new.flatten(), old.flip(2).flatten()]))[0, 1]) > 0.9
        for new, old in zip(first, images, strict=True)
    ]
    assert 16 < sum(mirrored) < 48


class TestRefusals:
    CPU = ("--accelerator", "cpu")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("-bs", "0"), "argument -bs/--batch-size: 0 is not at least 1"),
            (("-e", "two"), "argument -e/--epochs: invalid positive value: 'two'"),
            (("-lr", "-1"), "argument -lr/--learning-rate: -1 is not above 0"),
            (("--seed", "-1"), "argument --seed: -1 is not at least 0"),
            (("nowhere",), "there is no folder nowhere: leave it out to train on Fashion-MNIST"),
            (("--precision", "fp16"), "fp16 is for CUDA devices: on a CPU use precision='bf16' or 'fp32'"),
            (("--resume",), "there is no run to resume in runs/torch_ddp; leave --resume out to begin one"),
        ],
    )
    def test_by_ddp(self, run_here, clothes, capsys, words, message):
        data = () if words[0] == "nowhere" else (clothes,)
        assert run_here("train_torch_ddp.py", *data, *words, *self.CPU) == 2
        assert capsys.readouterr().err == f"train_torch_ddp.py: error: {message}\n"

    def test_of_half_of_stanford_dogs(self, run_here, dogs, capsys):
        (dogs / "test_list.mat").unlink()
        assert run_here("train_torch_ddp.py", dogs, *self.CPU) == 2
        assert f"error: {dogs} lacks test_list.mat: unpack lists.tar" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (1, "-bs 1 is the batch of all 2 devices together: use -bs 2 or more, or fewer devices"),
            (7, "-bs 7 cannot be divided among 2 devices: use -bs 6 or -bs 8"),
        ],
    )
    def test_of_batches_that_ranks_cannot_share(self, run_here, monkeypatch, clothes, capsys, batch, message):
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        assert run_here("train_torch_ddp.py", clothes, "-bs", batch, *self.CPU) == 2
        assert capsys.readouterr().err == f"train_torch_ddp.py: rank 1: error: {message}\n"

    @pytest.mark.parametrize(
        ("gpus", "words", "message"),
        [
            (0, (), "DataParallel copies the model among CUDA GPUs, and torch sees none: use train_torch_ddp.py"),
            (0, CPU, "strategy 'dp' copies a model among CUDA devices: on a CPU use 'ddp'"),
            (2, (), "-n 8 GPUs were asked for, and there are 2: use -n 2"),
            (2, ("-n", "0"), "argument -n/--n-gpus: 0 is not at least 1"),
            (2, ("-n", "2", "-bs", "9"), "-bs 9 cannot be divided among 2 devices: use -bs 8 or -bs 10"),
        ],
    )
    def test_by_dp(self, run_here, monkeypatch, clothes, capsys, gpus, words, message):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        assert run_here("train_torch_dp.py", clothes, *words) == 2
        assert capsys.readouterr().err == f"train_torch_dp.py: error: {message}\n"

    @pytest.mark.parametrize("words", [(), CPU])
    def test_of_tensorflow_that_is_not_there(self, run_here, monkeypatch, clothes, capsys, words):
        monkeypatch.setitem(sys.modules, "tensorflow", None)
        assert run_here("train_tf_mirroredstrategy.py", clothes, *words) == 2
        told = capsys.readouterr().err
        assert told.startswith("train_tf_mirroredstrategy.py: error: tensorflow is needed to train a Keras model")
        assert told.count("\n") == 1
