"""The command as a user meets it: processes, their output and exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.cli.main import main

TIMEOUT = 120
COMMAND = [sys.executable, "-m", "shoal"]


def shoal(*arguments, cwd, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture
def refuse(monkeypatch, capfd, tmp_path):
    """Runs the command in this process, where it must refuse; returns the line that it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def refuse(*arguments):
        monkeypatch.setattr(sys, "argv", ["shoal", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1, said
        return said

    return refuse


@pytest.fixture
def quickly(forked):
    """Runs the command in a process that is forked with everything imported."""

    def quickly(*arguments, cwd):
        return forked("forked:command", *arguments, cwd=cwd, COLUMNS="100")

    return quickly


def files_below(folder: Path):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One short demo, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("demo")
    return shoal("demo", "--rounds", 3, "--set", "client_validation=0.2", cwd=folder), folder


def test_demo_shows_its_rounds_and_leaves_a_run_folder(demo):
    done, folder = demo
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.findall(r"^round (\d)/3 · accuracy [\d.]+ · loss [\d.]+ · \d+ clients/s$", done.stdout, re.M) == [
        "1",
        "2",
        "3",
    ]
    assert "engine vectorized: the clients' models can be stacked" in done.stdout
    run = folder / "runs" / "digits-0001"
    assert f"report         {run.relative_to(folder)}/report.html" in done.stdout
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "model.safetensors", "report.html", "checkpoints", "tensorboard"}
    config = json.loads((run / "config.json").read_text())
    assert config["identity"]["seed"] == 0
    assert config["identity"]["algorithm"]["name"] == "FedAvg"
    assert config["identity"]["clients"]["partition"]["alpha"] == 0.3
    assert set(config["environment"]["versions"]) >= {"shoal", "python", "torch", "numpy"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2, 3]
    assert {"accuracy", "loss", "seconds", "clients", "bytes_up", "bytes_down"} <= set(records[0])


def test_the_next_demo_gets_a_folder_of_its_own_and_the_same_numbers(demo, quickly):
    _, folder = demo
    again = quickly("demo", "--rounds", 3, "--set", "client_validation=0.2", cwd=folder)
    assert again.returncode == 0, again.stderr
    models = [(folder / "runs" / name / "model.safetensors").read_bytes() for name in ("digits-0001", "digits-0002")]
    assert models[0] == models[1]


def test_a_finished_run_goes_on_with_more_rounds(demo, quickly):
    _, folder = demo
    run = "runs/digits-0001"
    refused = quickly("demo", "--rounds", 4, "--set", "client_validation=0.2", "--run-dir", run, cwd=folder)
    assert refused.returncode == 2
    assert "holds this run already: add --resume" in refused.stderr
    resumed = quickly("demo", "--rounds", 4, "--set", "client_validation=0.2", "--run-dir", run, "--resume", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert re.findall(r"^round (\d)/4", resumed.stdout, re.M) == ["4"]
    other = quickly("demo", "--rounds", 4, "--seed", 1, "--run-dir", run, "--resume", cwd=folder)
    assert other.returncode == 2
    assert "belongs to another configuration" in other.stderr


def test_a_truncated_checkpoint_is_said_and_the_one_before_it_used(demo, quickly):
    _, folder = demo
    shutil.copytree(folder / "runs/digits-0001", folder / "damaged")
    newest = max((folder / "damaged/checkpoints").glob("round-*"))
    number = int(newest.name.removeprefix("round-"))
    tensors = newest / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    words = ["--rounds", number, "--set", "client_validation=0.2", "--run-dir", "damaged", "--resume"]
    done = quickly("demo", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {newest.name} is damaged (state.safetensors is not the file that was written)" in done.stdout
    assert f"going on from round-{number - 1:06d}" in done.stdout
    assert re.findall(r"^round (\d)/", done.stdout, re.M) == [str(number)]
    same = [(folder / name / "model.safetensors").read_bytes() for name in ("runs/digits-0001", "damaged")]
    assert same[0] == same[1]


def test_reports_of_one_run_and_of_several(demo, quickly):
    _, folder = demo
    one = quickly("report", "runs/digits-0001", "-o", "one.html", cwd=folder)
    two = quickly("report", "runs/digits-0001", "runs/digits-0001", cwd=folder)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert (folder / "one.html").exists()
    assert "2 runs compared" in (folder / "report.html").read_text()


EXPERIMENT = """
from functools import partial
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
import shoal

def experiment(clients: int = 4, lr: float = 0.1, bad: str | None = None):
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(40, 5)).astype("float32"), np.arange(40) % 3
    if bad == "nan":
        inputs[17, 2] = np.nan
    if bad == "label":
        targets[9] = 3
    population = shoal.data.partition((inputs, targets), shoal.data.IID(clients=clients))
    if bad == "empty":
        population = shoal.data.Population(population.dataset, np.arange(40), np.array([0, 20, 20, 40]))
    def loss(output, target):
        if bad == "raise":
            raise ZeroDivisionError("the user's own loss")
        return F.cross_entropy(output, target)
    made = shoal.TorchLearner(partial(nn.Linear, 5, 3), loss=F.cross_entropy, optimizer=partial(torch.optim.SGD, lr=lr))
    if bad == "raise":
        def loss(output, target):
            if torch.is_grad_enabled():
                raise ZeroDivisionError("the user's own loss")
            return F.cross_entropy(output, target)
        made = shoal.TorchLearner(partial(nn.Linear, 5, 3), loss=loss, optimizer=partial(torch.optim.SGD, lr=lr))
    return shoal.Experiment(name="mine", learner=made, clients=population, rounds=2)
"""


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    return tmp_path


def test_an_experiment_file_and_its_settings(experiment, quickly):
    done = quickly(
        "federate", "mine.py", "--clients", 8, "--cohort", 2, "--set", "algorithm=fedprox", "--set", "algorithm.mu=0.5",
        "--set", "learner.epochs=2", "--set", "lr=0.2", "--seed", 5, "--engine", "sequential", "--device", "cpu",
        "--run-dir", "run", cwd=experiment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    identity = json.loads((experiment / "run/config.json").read_text())["identity"]
    assert identity["algorithm"] == {"name": "FedProx", "weighting": "examples", "server_lr": 1.0, "mu": 0.5}
    assert identity["learner"]["epochs"] == 2
    assert identity["learner"]["optimizer"]["lr"] == 0.2
    assert (identity["seed"], identity["cohort"], identity["clients"]["clients"]) == (5, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cohort", "9"], "a cohort of 9 clients was asked for, but the population has 4: use at most 4"),
        (["--clients", "0"], "IID: clients must be ≥ 1, not 0"),
        (["--clients", "41"], "40 samples cannot give 41 clients 1 each: use at most 40 clients"),
        (["--set", "bad=empty"], "client 1 has no samples"),
        (["--set", "bad=label"], "sample 9 has a label outside 0 to 2"),
        (["--set", "bad=nan"], "arrays: sample 17 has an input that is NaN or infinite"),
        (["--set", "algorithm=fedavgg"], "unknown algorithm 'fedavgg'; did you mean 'fedavg'"),
        (["--engine", "vectorised"], "unknown engine 'vectorised'; did you mean 'vectorized'"),
        (["--set", "ruonds=3"], "unknown setting 'ruonds'; did you mean 'rounds'"),
        (["--set", "algorithm.nu=3"], "unknown setting 'algorithm.nu'"),
        (["--set", "rounds"], "--set takes key=value, not 'rounds'"),
        (["--set", "lr=fast"], "lr takes float, not 'fast'"),
        (["--rounds", "0"], "rounds must be a whole number ≥ 1, not 0"),
        (["--seed", "-1"], "the seed must be a whole number ≥ 0, not -1"),
        (["--tracker", "wand"], "unknown tracker 'wand'; did you mean 'wandb'?"),
        (["--resume"], "--resume goes on with a run's folder: name it with --run-dir"),
        (["--device", "cuda:x"], "--device takes auto, cpu, cuda or cuda:NUMBER, not 'cuda:x'"),
        (["--set", "algorithm=fedprox", "--set", "algorithm.mu=-1"], "FedProx: mu must be ≥ 0, not -1.0"),
    ],
)
def test_bad_input_gets_one_clear_line_and_writes_nothing(refuse, arguments, message, experiment):
    before = files_below(experiment)
    line = refuse("federate", "mine.py", *arguments)
    assert line.startswith("shoal: error: ")
    assert message in line
    assert files_below(experiment) == before


def test_a_process_that_refuses_says_one_line_and_exits_with_2(experiment):
    before = files_below(experiment)
    done = shoal("federate", "mine.py", "--set", "bad=nan", cwd=experiment, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 2
    assert re.fullmatch(r"shoal: error: arrays: sample 17 has an input that is NaN or infinite.*\n", done.stderr)
    assert files_below(experiment) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["federate", "digit"], "unknown experiment 'digit'; did you mean 'digits'"),
        (["federate", "gone.py"], "there is no experiment file gone.py"),
        (["federate", "empty.py"], "empty.py has no function experiment"),
        (["report", "gone"], "there is no run folder gone"),
        (["report", "."], "is no run folder: it has no config.json"),
        (["demo", "--run-dir", "gone", "--resume"], "there is no run to resume in gone"),
        (["demo", "--data-dir", "x"], "unknown setting 'data_dir'"),
        (["federate", "cifar10", "--data-dir", "."], "cifar-10-python.tar.gz cannot be downloaded"),
        (["demo", "--run-dir", "."], "holds other things (empty.py, …) and no run"),
    ],
)
def test_names_that_do_not_exist(refuse, arguments, message, tmp_path):
    (tmp_path / "empty.py").write_text("")
    assert message in refuse(*arguments)
    assert files_below(tmp_path) == ["empty.py"]


def test_a_failing_client_shows_its_own_traceback(experiment, quickly):
    done = quickly("federate", "mine.py", "--set", "bad=raise", cwd=experiment)
    assert done.returncode == 1
    assert 'mine.py", line' in done.stderr
    assert "ZeroDivisionError: the user's own loss" in done.stderr
    assert re.search(r"^shoal: error: client \d failed in round 1: ZeroDivisionError", done.stderr.splitlines()[-1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(number, code, experiment, quickly):
    words = [
        "federate",
        "mine.py",
        "--rounds",
        "100000",
        "--set",
        "checkpoint_every=1000",
        "--set",
        "tensorboard=false",
    ]
    child = subprocess.Popen(
        [*COMMAND, *words], cwd=experiment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = experiment / "runs/mine-0001/metrics.jsonl"
        deadline = time.monotonic() + TIMEOUT
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait(10)
    assert child.returncode == code
    last = errors.strip().splitlines()[-1]
    done = int(re.search(r"stopped after round (\d+); the state is saved in runs/mine-0001; to go on: ", last)[1])
    assert len(metrics.read_text().splitlines()) == done
    assert (experiment / f"runs/mine-0001/checkpoints/round-{done:06d}/state.json").exists()
    resume = last.partition("to go on: shoal ")[2].split()
    assert resume == [*words, "--run-dir", "runs/mine-0001", "--resume"]
    resume[resume.index("100000")] = str(done + 2)
    finished = quickly(*resume, cwd=experiment)
    assert finished.returncode == 0, finished.stderr
    assert f"round {done + 1}/{done + 2}" in finished.stdout


def test_demo_takes_every_option_of_federate():
    from typer.main import get_command

    from shoal.cli.main import app

    def options(name):
        parameters = get_command(app).commands[name].params
        return {
            parameter.name: (parameter.opts, parameter.help)
            for parameter in parameters
            if parameter.name != "experiment"
        }

    assert options("demo") == options("federate")
    assert ["--set"] in [opts for opts, _ in options("demo").values()]


def test_doctor_speaks_json_and_english(tmp_path, quickly):
    spoken = quickly("doctor", cwd=tmp_path)
    assert spoken.returncode == 0, spoken.stderr
    found = json.loads(quickly("doctor", "--json", cwd=tmp_path).stdout)
    assert found["torch"]["version"] in spoken.stdout
    assert found["memory"]["available"] > 0
    assert found["torch"]["gloo"] is True
    for package, state in found["extras"].items():
        line = next(line for line in spoken.stdout.splitlines() if line.startswith(package))
        assert (state["version"] or state["install"]) in line


def test_help_and_version_import_nothing_heavy(tmp_path):
    heavy = ("torch", "numpy", "plotly", "sklearn", "tensorboardX", "safetensors", "mlflow", "wandb")
    for option in ("--help", "--version"):
        code = (
            "import sys; sys.argv = ['shoal', sys.argv[1]]\n"
            "from shoal.cli.main import main\n"
            "try:\n    main()\n"
            "except SystemExit as end:\n    assert not end.code, end.code\n"
            f"print([name for name in {heavy!r} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
