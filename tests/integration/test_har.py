"""The activity example: what its flags mean on one device and on several, and how it goes on after it was killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from har import EXAMPLE, write_recordings
from launches import Launch, wait_for_lines
from shoal.data.catalogue.download import data_home
from shoal.data.catalogue.hapt_files import find

MEASURED = ("epoch", "step", "examples", "train_loss", "train_accuracy", "loss", "accuracy", "learning_rate")
TINY = ("--vit-dim", 16, "--vit-depth", 1, "--hidden-dims", 16, "--no-freeze-encoder", "--accelerator", "cpu")
TESTED = 9 * 6 * 2
"""Windows of the people who are tested on."""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder that shoal reads as UCI HAPT."""
    folder = tmp_path_factory.mktemp("hapt")
    write_recordings(folder)
    return folder


@pytest.fixture
def start(nursery, recordings, tmp_path):
    """Starts the example with its run in a folder of that name."""

    def start(run, *flags):
        words = ["--data-dir", recordings, "--save-dir", tmp_path / run, *flags]
        return nursery.start("har:main", output=tmp_path / f"said-{run}", arguments=words, cwd=tmp_path)

    return start


@pytest.fixture
def finish(start, tmp_path):
    """Runs the example to its end; returns its folder and what it has said."""

    def finish(run, *flags):
        child = start(run, *flags)
        assert child.wait() == 0, child.told
        return tmp_path / run, child.told

    return finish


@pytest.fixture
def refuse(start):
    """Runs the example, which must refuse; returns the line that it says."""

    def refuse(*flags):
        child = start("refused", *flags)
        assert child.wait() == 2, child.told
        [line] = re.findall(r"^main_multi_gpu\.py: (.*)\n\Z", child.told, re.M)
        return line

    return refuse


def records(run):
    """Returns what was measured after each epoch."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in MEASURED} for line in lines]


def result(run):
    """Returns what the test has shown."""
    return json.loads((run / "test.json").read_text())


@pytest.mark.parametrize(
    ("mode", "channels", "repeated"), [("flatten", 1, 9), ("average", 1, 1), ("first", 1, 1), ("channels", 9, 1)]
)
def test_a_mode_decides_what_an_example_is(finish, mode, channels, repeated):
    run, told = finish(mode, "--mode", mode, "--epochs", 1, *TINY)
    patches = load_file(run / "model.safetensors")["encoder.patches.weight"]
    assert patches.shape == (16, channels, 8)
    assert result(run)["examples"] == TESTED * repeated
    assert f"mode {mode}: " in told
    [line] = records(run)
    assert line["examples"] == 2 * 6 * 2 * repeated


def test_two_processes_equal_one_with_the_same_examples_in_a_step(nursery, recordings, finish, tmp_path):
    flags = ["--encoder", "cnn", "--mode", "channels", "--dropout", 0, "--epochs", 1, "--accelerator", "cpu"]
    flags += ["--no-freeze-encoder", "--hidden-dims", 16, "--data-dir", recordings]
    one, _ = finish("one", *flags, "--batch-size", 10)
    words = [*flags, "--multi-gpu", "ddp", "--batch-size", 5, "--save-dir", tmp_path / "two"]
    launch = Launch(nursery, tmp_path, words, workers=2, run="har:main")
    assert launch.codes() == [0, 0], launch.told
    assert "batch: 5 examples a device × 2 devices = 10 a step (ddp, fp32)" in launch.told[0]
    assert launch.told[1] == ""
    for line, expected in zip(records(tmp_path / "two"), records(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)  # AdamW makes much of a rounding, and the more the longer
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "two", one))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-4)
    assert result(tmp_path / "two") == result(one)


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(start, finish, tmp_path):
    flags = [*TINY, "--epochs", 12, "--early-stopping-patience", 0, "--mode", "average", "--batch-size", 4]
    reference, _ = finish("reference", *flags)
    child = start("killed", *flags)
    wait_for_lines(tmp_path / "killed", 3)
    assert child.code is None
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    run, _ = finish("killed", *flags, "--resume")
    assert records(run) == records(reference)
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert result(run) == result(reference)


def test_the_rate_rises_step_by_step_and_then_falls(finish):
    run, _ = finish("rates", *TINY, "--epochs", 4, "--mode", "first", "--batch-size", 24, "--lr", 0.01)
    # One step an epoch, two of them warm-up: 1/2, 2/2, and the cosine at 0 and at 1/2 of its way.
    assert [line["learning_rate"] for line in records(run)] == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_a_frozen_encoder_keeps_its_weights_and_a_trained_one_can_be_taken_over(finish, refuse):
    flags = [*TINY, "--mode", "average", "--epochs", 1]
    trained, told = finish("trained", *flags)
    assert "warning" not in told
    file = trained / "model.safetensors"
    frozen, told = finish("frozen", *flags, "--freeze-encoder", "--encoder-path", file)
    assert "warning" not in told
    ours, theirs = load_file(frozen / "model.safetensors"), load_file(file)
    changed = [name for name in theirs if not np.array_equal(ours[name], theirs[name])]
    assert changed
    assert all(name.startswith("head.") for name in changed)
    line = refuse(*flags, "--encoder-path", file, "--vit-dim", 32)
    assert "holds another encoder: layers.0.linear1.bias is (64,) there and (128,) here" in line
    _, told = finish("random", *flags, "--freeze-encoder")
    assert "warning: the encoder is frozen with random weights, and only the head learns" in told


def test_half_precision_is_really_on(finish):
    flags = [*TINY, "--mode", "average", "--epochs", 1, "--dropout", 0]
    full, told = finish("full", *flags, "--no-amp")
    assert "= 32 a step (single, fp32)" in told
    half, told = finish("half", *flags, "--precision", "bf16")
    assert "= 32 a step (single, bf16)" in told
    [ours], [theirs] = records(half), records(full)
    assert ours["train_loss"] != theirs["train_loss"]
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--multi-gpu", "ddp"], "needs a process for each device: torchrun --nproc_per_node=2 main_multi_gpu.py"),
        (["--multi-gpu", "dp", "--accelerator", "cpu"], "--multi-gpu dp needs CUDA devices, and there is none to use"),
        (["--no-amp", "--precision", "bf16"], "--no-amp means fp32, and --precision bf16 was given too"),
        (["--accelerator", "cpu", "--precision", "fp16"], "fp16 is for CUDA devices"),
        (["--accelerator", "cpu", "--gpu-ids", "0"], "ids ≥ 0 select CUDA devices"),
        (["--encoder-path", "nothing.safetensors"], "--encoder-path nothing.safetensors is no safetensors file"),
        (["--vit-patch", "7"], "patches of 7 samples do not divide a window of 128"),
        (["--epochs", "0"], "argument --epochs: 0 is not a number ≥ 1"),
        (["--mode", "all"], "argument --mode: invalid choice: 'all'"),
        (["--resume"], "there is no run to resume in"),
        (["--rate", "1"], "unrecognized arguments: --rate 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(refuse, flags, message, tmp_path):
    assert message in refuse("--subset", 4, *flags).replace(f"{tmp_path}/", "")
    assert not (tmp_path / "refused").exists()


def test_data_that_are_not_there_are_asked_for(nursery, tmp_path):
    (tmp_path / "RawData").mkdir()
    child = nursery.start("har:main", output=tmp_path / "said", arguments=["--data-dir", tmp_path], cwd=tmp_path)
    assert child.wait() == 2
    assert re.fullmatch(r"main_multi_gpu\.py: .*RawData.*\n", child.told)


def test_processes_without_a_strategy_are_refused_by_each_rank(nursery, tmp_path):
    launch = Launch(nursery, tmp_path, [], workers=2, run="har:main")
    assert launch.codes() == [2, 2]
    for rank, told in enumerate(launch.told):
        assert told == (
            f"main_multi_gpu.py: rank {rank}: 2 processes were started: add --multi-gpu ddp, or start one with python\n"
        )


def test_a_second_run_in_one_folder_needs_a_word(finish, refuse, tmp_path):
    flags = [*TINY, "--mode", "first", "--epochs", 1]
    finish("refused", *flags)
    assert "holds this run already: add --resume to go on" in refuse(*flags)
    assert "belongs to another configuration" in refuse(*flags, "--lr", 0.5)


def run_words(words, cwd, seconds, **environment):
    """Runs a command as a user does, with this Python first in the path; kills all of it when its time is over."""
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHON": sys.executable}
    with subprocess.Popen(
        [*map(str, words)], cwd=cwd, env=variables | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            told, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, told


@pytest.mark.slow
def test_the_launcher_starts_torchrun_with_its_arguments(recordings, tmp_path):
    words = [EXAMPLE / "launch_multi_gpu.sh", "--mode", "ddp", "--gpus", 2, "--epochs=1", "--batch-size", 6]
    words += ["--mode", "channels", "--data-dir", recordings, "--save-dir", tmp_path / "run", *TINY]
    code, told = run_words(words, tmp_path, 120)
    assert code == 0, told
    assert "batch: 6 examples a device × 2 devices = 12 a step (ddp, fp32)" in told
    assert records(tmp_path / "run")[0]["learning_rate"] == pytest.approx(
        0.002
    )  # both steps are warm-up, and half of it
    assert result(tmp_path / "run")["examples"] == TESTED
    assert any((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("words", "does"),
    [
        (
            [],
            "-m torch.distributed.run --standalone --nproc_per_node=4 "
            "MAIN --multi-gpu ddp --batch-size 32 --epochs 20 --lr 0.004",
        ),
        (["--mode", "dp", "--gpus=2"], "MAIN --multi-gpu dp --gpu-ids 0,1 --batch-size 32 --epochs 20 --lr 0.002"),
        (
            ["--lr", "3e-4", "--mode", "dp", "--gpus", "1", "--mode", "flatten", "--resume"],
            "MAIN --multi-gpu dp --gpu-ids 0 --batch-size 32 --epochs 20 --lr 3e-4 --mode flatten --resume",
        ),
    ],
)  # fmt: skip
def test_what_the_launcher_runs(words, does, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 4 || echo "ran: $*"\n')
    python.chmod(0o755)
    code, told = run_words([EXAMPLE / "launch_multi_gpu.sh", *words], tmp_path, 20, PYTHON=str(python))
    assert code == 0, told
    assert f"ran: {does.replace('MAIN', str(EXAMPLE / 'main_multi_gpu.py'))}\n" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus"], "--gpus needs a value"),
        (["--gpus", "two"], "--gpus two: a number ≥ 1"),
        (["--gpus=0"], "--gpus 0: "),
    ],
)
def test_what_the_launcher_refuses(words, message, tmp_path):
    code, told = run_words([EXAMPLE / "launch_multi_gpu.sh", *words], tmp_path, 20)
    assert (code, told.count("\n")) == (2, 1)
    assert message in told


@pytest.mark.slow
@pytest.mark.skipif(find(data_home("hapt")) is None, reason="HAPT is not there: run examples/har/prepare_data.sh")
def test_the_readme_s_command_reaches_its_accuracy_on_people_it_has_never_seen(tmp_path):
    [command] = re.findall(
        r"^(python main_multi_gpu\.py --mode channels --encoder cnn .*)$", (EXAMPLE / "README.md").read_text(), re.M
    )
    words = shlex.split(command.partition("#")[0])
    words[1] = str(EXAMPLE / words[1])
    code, told = run_words([*words, "--save-dir", tmp_path / "run"], tmp_path, 280, CUDA_VISIBLE_DEVICES="")
    assert code == 0, told
    assert result(tmp_path / "run")["accuracy"] >= 0.93
    assert result(tmp_path / "run")["examples"] == 2874
