"""Federations of Keras clients: the algorithms give what they give with torch, on each engine that takes them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import shoal
from keras_federation import learner
from keras_reference import BIAS, KERNEL, clients, methods

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", methods())
def test_an_algorithm_ends_where_it_does_with_torch(reference, name):
    expected = reference["federations"][name]
    ours = shoal.federate(
        learner(), clients(), rounds=4, cohort=4, algorithm=methods()[name], evaluate=clients()[1], engine="sequential"
    )
    for array in (KERNEL, BIAS):
        np.testing.assert_allclose(ours.params[array], expected["params"][array], atol=1e-5, rtol=0)
    assert np.abs(ours.params[KERNEL]).max() > 0.02
    for mine, other in zip(ours.history, expected["history"], strict=True):
        assert mine["accuracy"] == pytest.approx(other["accuracy"], abs=1e-6)
        assert mine["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)


def in_new_process(*words):
    """Runs the federation in a process in which TensorFlow has not started; returns what it tells."""
    program = Path(__file__).parents[1] / "keras_federation.py"
    done = subprocess.run(
        [sys.executable, program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_processes_give_the_same_bits_and_are_refused_where_they_would_hang():
    told = in_new_process("process")
    assert told["process"] == told["sequential"]
    assert told["refused"].startswith("engine 'process' cannot run here: TensorFlow is in use in this process")


def test_a_run_that_is_resumed_gives_the_same_bits(tmp_path):
    whole = shoal.federate(learner(), clients(), rounds=4, engine="sequential")
    for rounds in (2, 4):
        parts = shoal.federate(
            learner(), clients(), rounds=rounds, engine="sequential", run_dir=tmp_path / "run", resume=rounds == 4
        )
    for name, array in whole.params.items():
        np.testing.assert_array_equal(parts.params[name], array)
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("program", "wanted"), [("digits_keras.py", 0.85), ("keras_job.py", 0.85), ("keras_learner_sites.py", 0.8)]
)
def test_the_guides_programs_learn(tmp_path, program, wanted):
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "tensorflow.md").read_text()
    for name, code in re.findall(r'```python title="(.+?)"\n(.+?)```', guide, re.DOTALL):
        (tmp_path / name).write_text(code)
    done = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env=os.environ | {"KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"metric='accuracy', value=([0-9.]+)", done.stdout)
    assert float(found[1]) > wanted


def test_without_tensorflow_the_learner_says_what_to_install():
    code = "import sys; sys.modules['tensorflow'] = None; import shoal; shoal.KerasLearner"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    told = "tensorflow is needed to train a Keras model and is not installed: pip install 'shoal[tensorflow]'"
    assert told in done.stderr.splitlines()[-1]


def test_another_backend_of_keras_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import shoal; shoal.KerasLearner"],
        env=os.environ | {"KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "set KERAS_BACKEND=tensorflow before Python starts" in done.stderr.splitlines()[-1]
