"""Scripts for NVFlare's Client API as sites of shoal, with two ranks each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import shoal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

SCRIPT = Path(__file__).parents[1] / "flare_site.py"


@pytest.mark.parametrize("form", ["rank_0_alone", "all_ask", "all_receive", "until_none"])
def test_a_script_of_two_ranks_ends_with_its_federation(form, tmp_path):
    job = shoal.Job(
        "flare",
        script=SCRIPT,
        args=[form],
        model={"w": np.zeros(5, np.float32)},
        sites=[shoal.Site("a", devices=2), shoal.Site("b", devices=2)],
        accelerator="cpu",
        rounds=3,
        waits=shoal.Deadlines(start=90, reply=30, finish=30),
    )
    result = job.run(run_dir=tmp_path / "run")
    np.testing.assert_allclose(result.params["w"], np.full(5, 3.0))
    assert result.history[-1]["train_loss"] == pytest.approx(1.0)
    assert result.history[-1]["train_extra"] == pytest.approx(2.0)
    for site in "ab":
        lines = (tmp_path / "run" / "sites" / f"{site}.log").read_text()
        assert lines.count("the end") == 2
        for round in range(3):
            assert f"rank 0: round {round} of 3 at {site}" in lines
