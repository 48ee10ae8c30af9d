"""Sites whose scripts go wrong: it is seen, told, and dealt with as the policy says; nothing is left behind."""

from __future__ import annotations

import re

import numpy as np
import pytest

import shoal
from shoal.errors import SiteError
from site_jobs import Jobs, expected, said

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

RAISES = {"does": "raise", "rank": 1, "round": 0}
FAULTS = {
    "raise before": (RAISES, "rank 1 .* ended with exit code 1", "RuntimeError: the user's own error"),
    "raise": (RAISES | {"round": 2}, "rank 1 .* ended with exit code 1", "RuntimeError: the user's own error"),
    "code": ({"does": "code", "rank": 1, "round": 2}, "rank 1 .* ended with exit code 7", "hello from"),
    "exit": ({"does": "exit", "round": 2}, "rank 0 .* left its loop", "hello from"),
    "sleep": ({"does": "sleep", "rank": 1, "round": 2}, "next task within [48] s; .*rank 1 is at site_script.py", ""),
    "break": ({"does": "break", "rank": 1, "round": 2}, "rank 1 .* left its loop", "the end of"),
    "no reply": ({"does": "no-reply", "round": 2}, "rank 0 .* ended with exit code 1", "went on without a reply"),
    "twice": ({"does": "twice", "round": 2}, "rank 0 .* ended with exit code 1", "was replied to already"),
    "nan": ({"does": "nan", "round": 2}, "it sent NaN or infinity in w", "hello from"),
    "shape": ({"does": "shape", "round": 2}, r"it sent w with shape \[3\], and \[5\] is expected", "hello from"),
    "name": ({"does": "name", "round": 2}, "rank 0 .* ended with exit code 1", "the reply lacks w"),
    "kill": ({"does": "kill", "rank": 1, "round": 2}, "rank 1 .* was ended by SIGKILL", "hello from"),
    "stop": ({"does": "stop", "rank": 1, "round": 2}, "rank 1 .* was stopped, as by SIGSTOP", "hello from"),
}  # fmt: skip


GOOD = {"site-20": 1, "site-21": 2}

WAITS = shoal.Deadlines(reply=8, silence=3)


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Jobs whose processes are forked from this one, so that they start at once."""
    with Jobs(tmp_path).watched(monkeypatch, quick=True) as jobs:
        yield jobs


@pytest.fixture(scope="module")
def faulty():
    """A site for each fault, with its number of ranks, and the faults by site."""
    sites = {f"site-{number}": 2 for number in range(1, len(FAULTS) + 1)}
    return sites, dict(zip(sites, [fault for fault, _, _ in FAULTS.values()], strict=True))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_failure_stops_the_run(jobs, kind):
    fault, what, line = FAULTS[kind]
    waits = shoal.Deadlines(reply=4, silence=2)
    with pytest.raises(SiteError) as raised:
        jobs.job({"site-1": 1, "site-2": 2}, faults={"site-2": fault}, waits=waits).run()
    told = said(raised.value)
    assert raised.match(f"^site-2: .*{what}")
    assert line in told
    assert f"of rank {fault.get('rank', 0)} of site-2" in told or kind == "sleep"
    assert raised.match("before the first round|in round 1" if fault["round"] == 0 else "in round [23]")


def assert_mean(result, *sites):
    """Asserts that a result is that of sites to which nothing has happened."""
    np.testing.assert_allclose(result.params["w"], expected(dict.fromkeys(sites, range(1, 5))), atol=1e-6)


class Ends(shoal.Callback):
    """Notes down why clients failed."""

    def __init__(self):
        self.errors = {}

    def on_client_end(self, round, client, error):
        if error is not None:
            self.errors.setdefault(client, []).append((round, said(error)))


def test_continue_goes_on_without_the_sites_that_failed(jobs, faulty):
    """All faults in one run, each at a site of its own."""
    sites, faults = faulty
    ends = Ends()
    job = jobs.job(sites | GOOD, faults=faults, on_failure="continue", min_sites=2, waits=WAITS)
    result = job.run(callbacks=[ends])
    present = {site: {1, 2, 3, 4} for site in GOOD}
    for client, (site, (fault, what, line)) in enumerate(zip(sites, FAULTS.values(), strict=True)):
        (first, told), *later = ends.errors[client]
        assert re.search(f"^{site}: .*{what}", told), told
        assert line in told
        assert all(why.startswith(told.splitlines()[0]) for _, why in later)
        assert [round for round, _ in ends.errors[client]] == list(range(first, 5))
        assert first in {fault["round"] or 1, fault["round"] + 1}
        present[site] = set(range(1, first))
    assert result.history[0]["clients"] >= 2
    assert result.history[3]["clients"] == 2
    order = {site: present[site] for site in [*sites, *GOOD]}
    np.testing.assert_allclose(result.params["w"], expected(order), atol=1e-6)


def test_restart_ends_as_if_nothing_was(jobs, faulty):
    """Bit for bit, with all faults in one run."""
    sites, faults = faulty
    whole = jobs.job(sites | GOOD, waits=WAITS).run()
    result = jobs.job(sites | GOOD, faults=faults, on_failure="restart", waits=WAITS).run()
    assert result.params["w"].tobytes() == whole.params["w"].tobytes()
    assert [record["clients"] for record in result.history] == [len(sites) + len(GOOD)] * 4


def test_a_site_is_started_again_so_often_and_no_more(jobs):
    fault = {"does": "code", "round": 2, "attempts": [0, 1]}
    for most in (1, 2):
        job = jobs.job({"site-1": 1, "site-2": 1}, faults={"site-2": fault}, on_failure="restart", max_restarts=most)
        if most == 1:
            with pytest.raises(SiteError, match="^site-2: rank 0 .* ended with exit code 7 in round 2"):
                job.run()
        else:
            assert_mean(job.run(), "site-1", "site-2")


def test_too_few_sites_are_left(jobs):
    faults = {"site-1": {"does": "code", "round": 1}, "site-2": {"does": "raise", "round": 2}}
    job = jobs.job({f"site-{n}": 1 for n in (1, 2, 3)}, faults=faults, on_failure="continue", min_sites=2)
    with pytest.raises(SiteError, match="site-2: .* in round 2; 1 sites are left, and min_sites=2"):
        job.run()


@pytest.mark.parametrize("policy", ["stop", "restart"])
def test_a_launcher_that_is_killed_ends_its_site(jobs, policy):
    fault = {"does": "kill-launcher", "rank": 1, "round": 2}
    with pytest.raises(SiteError, match="site-2: its launcher .*(has ended|is gone)"):
        jobs.job({"site-1": 1, "site-2": 2}, faults={"site-2": fault}, on_failure=policy, pause=0.5).run()


def test_a_rank_that_hangs_before_it_joins_is_started_again(jobs):
    waits = shoal.Deadlines(start=4, reply=20, silence=3)
    fault = {"does": "sleep", "round": 0}
    job = jobs.job({"site-1": 1, "site-2": 1}, faults={"site-2": fault}, on_failure="restart", waits=waits)
    assert_mean(job.run(), "site-1", "site-2")


def test_what_a_script_has_started_ends_with_the_run(jobs):
    faults = {"site-2": {"does": "spawn", "round": 2}}
    jobs.job({"site-1": 1, "site-2": 1}, faults=faults).run()
