"""The multi-GPU examples: both jobs as a user starts them, on data that are learnt at once, and their scripts alone."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import pictures
import shoal
from shoal.errors import RunInterrupted
from shoal.federation.job_files import load_job
from tracked import tensorboard_events

EXAMPLES = Path(__file__).parents[2] / "examples" / "multi_gpu"
BIN = Path(sys.executable).parent
QUICK = ("--batch_size", 8, "--lr", 0.01, "--local_epochs", 2, "--accelerator", "cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder in the format of CIFAR-10, with few images."""
    return pictures.write_cifar10(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(tmp_path):
    """Runs a command to its end in a folder of the test's; returns what it has written to a stream."""

    def run(*words, code=0, stream="stdout"):
        environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
        done = subprocess.run(
            [*map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr
        return getattr(done, stream)

    return run


def scalars(folder):
    """Returns the names of the scalars in a folder of TensorBoard's events."""
    return {value.tag for event in tensorboard_events(folder) for value in event.summary.value}


def measured(run_dir):
    """Returns the accuracy of the global model after each round."""
    return [json.loads(line)["accuracy"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("example", ["torch_ddp", "lightning_ddp"])
def test_a_job_of_two_sites_with_two_ranks_each(example, run, images, tmp_path):
    words = ("--num_rounds", 3, "--data_dir", images, "--use_tracking", *QUICK)
    said = run(sys.executable, EXAMPLES / example / "job.py", *words)
    assert said.startswith("the images are those of cifar10\n")
    folder = tmp_path / "runs" / example
    accuracy = measured(folder)
    assert len(accuracy) == 3
    assert accuracy[0] < accuracy[2]
    assert accuracy[2] > 0.5
    for number, value in enumerate(accuracy, 1):
        assert f"round {number}/3 · accuracy {value:.4f} · " in said
    assert {"accuracy", "site-1/loss", "site-2/loss"} <= scalars(folder / "tensorboard")
    if example == "lightning_ddp":
        for site in (1, 2):
            assert {"loss", "accuracy", "test_accuracy"} <= scalars(folder / f"lightning/tensorboard/site-{site}")
        kept = {str(path.parent.relative_to(folder / "lightning")) for path in folder.rglob("*.ckpt")}
        assert kept == {f"checkpoints/site-{site}/round-{number}" for site in (1, 2) for number in (1, 2, 3)}


@pytest.fixture
def exported(run, images, tmp_path):
    """Exports the job of an example, and takes it elsewhere; returns its folder."""

    def exported(example, sites=1, devices=1, rounds=1):
        words = ("--n_clients", sites, "--devices_per_client", devices, "--num_rounds", rounds, "--images", 80)
        said = run(
            sys.executable, EXAMPLES / example / "job.py", *words, "--data_dir", images, *QUICK, "--export_config"
        )
        assert said == f"run it with: shoal federate jobs/{example}\n"
        assert not (tmp_path / "runs").exists()
        return (tmp_path / "jobs" / example).rename(tmp_path / "moved")

    return exported


@pytest.mark.slow
def test_an_exported_job_runs_elsewhere_and_a_finished_run_resumes_at_once(exported, run, tmp_path):
    command = ("shoal", "federate", exported("torch_ddp"), "--run-dir", tmp_path / "run")
    assert "round 1/1 · accuracy " in run(*command)
    # The sites' ranks are still starting when there is nothing left for them to do.
    assert "was ended" not in run(*command, "--resume", stream="stderr")


@pytest.mark.slow
def test_an_exported_job_of_lightning_is_whole(exported):
    job = load_job(exported("lightning_ddp"))
    assert {"client.py", "data.py", "model.py"} <= {path.name for path in Path(job.script).parent.iterdir()}
    assert [(site.name, site.devices) for site in job.sites] == [("site-1", 1)]
    assert "--root_dir" not in job.args  # which is a run's


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("nvflare")
def test_a_job_of_lightning_at_real_sites_gives_what_it_gives_at_home(exported, run, tmp_path):
    pytest.importorskip("nvflare")
    from shoal.deploy.nvflare_submit import simulate

    job = exported("lightning_ddp", sites=2, devices=2, rounds=2)
    run("shoal", "federate", job, "--run-dir", tmp_path / "home")
    sites = simulate(job, tmp_path / "workspace", ["site-1", "site-2"], show=print, within=280)
    assert measured(sites) == pytest.approx(measured(tmp_path / "home"), abs=1e-6)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (sites, tmp_path / "home"))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("example", ["torch_ddp", "lightning_ddp"])
def test_a_job_that_is_interrupted_says_how_it_can_go_on(example, images, tmp_path, monkeypatch, capsys):
    def run(job, **options):
        raise RunInterrupted(f"stopped after round 2; the state is saved in {options['run_dir']}")

    monkeypatch.setattr(shoal.Job, "run", run)
    monkeypatch.syspath_prepend(EXAMPLES / example)
    for name in ("data", "model"):  # which the two examples call alike
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["job.py", "--data_dir", str(images), "--run_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / example / "job.py"), run_name="__main__")
    assert end.value.code == 130
    told = (
        f"job.py: stopped after round 2; the state is saved in {tmp_path}; to go on: the same command with --resume\n"
    )
    assert capsys.readouterr().err == told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "launcher"), [("torch_ddp", "python"), ("torch_ddp", "torchrun"), ("lightning_ddp", "torchrun")]
)
def test_a_script_runs_alone(example, launcher, run, images):
    start = (sys.executable,) if launcher == "python" else ("torchrun", "--standalone", "--nproc_per_node=2")
    words = ("--data_dir", images, "--images", 160, "--batch_size", 8)
    said = run(*start, EXAMPLES / example / "client.py", *words)
    assert said.count("cifar10: 160 of 400 images to train on, 80 ") == 1
    assert said.count("shoal: the task to train in round 1 alone, 160 examples: loss ") == 1


def test_a_folder_without_data_is_refused_before_anything_starts(run, tmp_path):
    said = run(sys.executable, EXAMPLES / "torch_ddp" / "job.py", "--data_dir", tmp_path, code=1, stream="stderr")
    told = f"job.py: {tmp_path} has neither CIFAR-10 nor Fashion-MNIST: ./prepare_data.sh {tmp_path}"
    assert said.splitlines()[-1] == told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("example", ["torch_ddp", "lightning_ddp"])
def test_data_that_are_there_are_not_fetched(example, run, images):
    said = run(EXAMPLES / example / "prepare_data.sh", images)
    assert said == f"CIFAR-10 is in {images}\n"
