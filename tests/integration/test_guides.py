"""Every command of a guide is run, or marked as one that needs what is not here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import shoal

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
MULTI_GPU, SCRIPTS, README = GUIDES / "multi_gpu.md", GUIDES / "federate_your_script.md", ROOT / "README.md"
MARKS = ("# needs GPUs", "# a package of its own")
PROGRAMS = {"python": "forked:script", "shoal": "forked:command"}
"""What a page's commands are of, each with what stands in for it."""


def commands(page):
    """The page's commands that are to be run, in its order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [line for line in lines if not line.rstrip().endswith(MARKS)]


def titled(page):
    """The page's blocks that are whole files: kind, name and text of each."""
    return re.findall(r'^```(python|diff) title="(.+?)"\n(.*?)^```', page.read_text(encoding="utf-8"), re.M | re.S)


def one_side(diff, sign):
    """A file before (``-``) or after (``+``) the change."""
    lines = diff.splitlines()
    assert all(not line or line[0] in " +-" for line in lines)
    return "".join(f"{line[1:]}\n" for line in lines if not line or line[0] in f" {sign}")


def write_files(page, folder):
    for kind, name, text in titled(page):
        (folder / name).write_text(one_side(text, "+") if kind == "diff" else text)


def run(line, folder, forked=None):
    """Runs a command; returns what it has said.

    Args:
        line: Of a page.
        folder: Where.
        forked: The fixture, to fork it and all that it starts, which otherwise takes seconds for each process.
    """
    program, *words = shlex.split(line, comments=True)
    assert program in PROGRAMS, f"{line} is neither run nor marked"
    env = {"OMP_NUM_THREADS": "1"}
    if forked:
        done = forked(PROGRAMS[program], *words, cwd=folder, **env)
    else:
        env = os.environ | env | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run([program, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_the_guide_do_what_it_says(forked, tmp_path):
    found = commands(MULTI_GPU)
    assert len(found) > 6
    for line in found:
        run(line, tmp_path, forked)
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert runs == {"one", "two", "fsdp", "scaled", "accumulated", "again", "traced"}
    assert list((tmp_path / "runs" / "traced" / "trace").iterdir())


def test_a_script_knows_nothing_of_shoal_before_it_is_changed():
    diffs = {name: text for kind, name, text in titled(SCRIPTS) if kind == "diff"}
    assert list(diffs) == ["train.py", "ddp.py", "fsdp.py", "lit.py"]
    for name, text in diffs.items():
        before = one_side(text, "-")
        compile(before, name, "exec")
        assert "shoal" not in before
        assert "task" not in before


@pytest.mark.slow
def test_a_plain_script_runs_before_it_is_changed(tmp_path):
    write_files(SCRIPTS, tmp_path)
    [diff] = [text for _, name, text in titled(SCRIPTS) if name == "train.py"]
    (tmp_path / "train.py").write_text(one_side(diff, "-"))
    assert run("python train.py", tmp_path).startswith("epoch 0: loss ")


@pytest.mark.slow
def test_the_scripts_of_the_guide_join_a_federation(forked, tmp_path):
    """The first as a user starts it, and the others forked."""
    write_files(SCRIPTS, tmp_path)
    first, *others = commands(SCRIPTS)
    told = {first: run(first, tmp_path)} | {line: run(line, tmp_path, forked) for line in others}
    runs = tmp_path / "runs"
    assert {path.name for path in runs.iterdir()} == {"train", "ddp", "fsdp", "lit", "exported"}
    for name in ("train", "ddp", "fsdp", "lit", "exported"):
        assert {path.name for path in (runs / name / "sites").iterdir()} == {"site-1.log", "site-2.log"}
    ddp, fsdp = (load_file(runs / name / "model.safetensors") for name in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    assert max(abs(ddp[name] - fsdp[name]).max() for name in ddp) < 1e-5
    assert {line for line, out in told.items() if "Best(round=" in out} == {
        line for line in told if line.startswith(("python job.py", "python lit_job.py", "python no_script.py"))
    }
    alone = [line for line, out in told.items() if "the task to train in round 1 alone, 750 examples" in out]
    assert alone == ["python train.py", "python calls.py"]


def test_the_settings_of_the_guide_are_what_there_is(tmp_path, monkeypatch):
    fragments = re.findall(r"^```python\n(.*?)^```", SCRIPTS.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    names = {"shoal": shoal, "make_net": dict, "sites": [shoal.Site("site-1"), shoal.Site("site-2")]}
    [site] = [text for text in fragments if text.startswith("site = ")]
    [job] = [text for text in fragments if text.startswith("job = ")]
    exec(site + job, names)
    assert names["site"].ranks == 2
    assert names["job"].experiment().patience == 5


@pytest.mark.slow
def test_the_site_of_the_readme_joins_its_job(tmp_path):
    write_files(README, tmp_path)
    assert float(run("python job.py", tmp_path)) < 1
    assert (tmp_path / "runs" / "sites" / "model.safetensors").exists()
