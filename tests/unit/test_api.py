from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shoal
from shoal.version import __version__

ROOT = Path(__file__).parents[2]

APART = {"KerasLearner"}
"""What brings TensorFlow into the process; it is looked at in tests/keras_models."""


def test_all_is_sorted_and_every_name_is_there():
    assert sorted(shoal.__all__) == shoal.__all__ == dir(shoal)
    assert len(set(shoal.__all__)) == len(shoal.__all__)
    for name in set(shoal.__all__) - APART:
        assert getattr(shoal, name) is not None


@pytest.mark.parametrize("module", ["algorithms", "data", "devices", "engines", "federation", "runs"])
def test_so_it_is_with_the_packages(module):
    package = getattr(__import__(f"shoal.{module}"), module)
    assert list(package.__all__) == sorted(package.__all__, key=lambda name: (not name.isupper(), name.islower(), name))
    for name in package.__all__:
        assert hasattr(package, name)


def test_every_public_thing_says_what_it_is():
    for name in set(shoal.__all__) - APART - {"__version__"}:
        assert getattr(shoal, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'shoal' has no attribute 'FedAvgg'"):
        shoal.FedAvgg  # noqa: B018


def test_importing_does_nothing():
    code = """
import os, sys, warnings

def loaded(*names):
    return [name for name in names if name in sys.modules]

before = dict(os.environ), list(warnings.filters)
import shoal
assert (dict(os.environ), list(warnings.filters)) == before
assert not loaded("torch", "numpy", "rich", "typer", "plotly"), loaded("torch", "numpy", "rich", "typer", "plotly")
shoal.data, shoal.FedAvg
assert not loaded("torch", "sklearn", "plotly", "tensorboardX", "safetensors", "mlflow", "wandb")
assert dict(os.environ) == before[0]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_version_is_in_one_place_and_in_the_changelog():
    assert re.search(rf"^## {re.escape(__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert 'path = "src/shoal/version.py"' in (ROOT / "pyproject.toml").read_text()


def test_every_dependency_is_bounded_and_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *itertools.chain.from_iterable(project["optional-dependencies"].values())]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for requirement in asked:
        name = re.match(r"[\w-]+", requirement)[0].lower()
        if name == "shoal":
            continue
        assert re.search(r">=[\d.]+,<[\d.]+$", requirement), requirement
        assert name in pinned, name
