"""Every command of a guide is run, or marked as one that needs what is not here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "multi_gpu.md"
MARKS = ("# needs GPUs", "# a package of its own")


def commands():
    """The guide's commands that are to be run, in its order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [line for line in lines if not line.rstrip().endswith(MARKS)]


@pytest.mark.slow
def test_the_commands_of_the_guide_do_what_it_says(tmp_path):
    found = commands()
    assert len(found) > 6
    for line in found:
        program, *arguments = shlex.split(line)
        assert program == "shoal", f"{line} is neither run nor marked"
        done = subprocess.run(
            [sys.executable, "-m", "shoal", *arguments],
            cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr)
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert runs == {"one", "two", "fsdp", "scaled", "accumulated", "again", "traced"}
    assert list((tmp_path / "runs" / "traced" / "trace").iterdir())
