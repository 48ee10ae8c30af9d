"""The examples run as their READMEs say, and the README's Python does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(words, cwd):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_quickstart(forked, tmp_path):
    folder = ROOT / "examples" / "quickstart"
    done = run([sys.executable, str(folder / "federate.py"), "--rounds", "3"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "compared.html").exists()
    settings = ["--set", "alpha=0.1", "--set", "algorithm=fedprox", "--set", "algorithm.mu=0.1", "--rounds", "2"]
    done = forked("forked:command", "federate", folder / "experiment.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_scaling_prints_a_row_for_each_engine(tmp_path):
    words = ["env", "ENGINE=sequential,vectorized,process", f"PYTHON={sys.executable}"]
    done = run([*words, str(ROOT / "examples" / "scaling" / "run.sh"), "400", "100", "3", "2"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines())
    assert head == ["clients", "engine", "host memory", "device memory", "time a round", "accuracy"]
    assert [row[:2] for row in rows] == [["400", "sequential"], ["400", "vectorized"], ["400", "process"]]
    assert all(float(row[2].removesuffix(" MiB").replace(",", "")) > 100 for row in rows)
    assert rows[0][5] == rows[2][5]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2", "3"], "a round that waits for 3 clients never begins with 2"),
        (["2", "2", "3"], "3 clients cannot be sampled from 2"),
        (["2", "2", "2", "0"], "argument NBROUNDS: 0 is not at least 1"),
        (["two"], "argument NBCLIENTS: invalid positive value: 'two'"),
        (["60001"], "60001 clients cannot share 60,000 images"),
    ],
)
def test_scaling_refuses_what_cannot_be(words, message, tmp_path):
    script = str(ROOT / "examples" / "scaling" / "run.sh")
    done = run(["env", f"PYTHON={sys.executable}", script, *words], tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("page", ["README.md", "docs/guides/federate.md", "docs/guides/engines.md"])
def test_the_python_on_a_page_runs_from_top_to_bottom(forked, page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    code = re.sub(r"rounds=\d+", "rounds=2", "\n".join(blocks))
    done = forked("forked:strict", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/guides/federate.md",
        "docs/guides/engines.md",
        "docs/guides/workers.md",
        "examples/quickstart/README.md",
    ],
)
def test_the_commands_on_a_page_exist(page):
    from typer.main import get_command

    from shoal.cli.main import app

    commands = get_command(app).commands
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S)
    shown = re.findall(r"^shoal (\w+)(.*)$", "\n".join(blocks), re.M)
    for name, rest in shown:
        command = commands[name]
        if inner := getattr(command, "commands", None):  # shoal bench simulate
            command = inner[rest.split()[0]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[\w-]+", rest)) <= options, (name, rest)


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
