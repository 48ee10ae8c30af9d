from __future__ import annotations

import json

import numpy as np
import pytest

import shoal
from shoal.devices import Devices
from shoal.errors import ConfigurationError


@pytest.mark.parametrize("name", ["site-1", "A", "0", "a.b_c-d", "x" * 200])
def test_a_name_may_be_that_of_a_file(name):
    assert shoal.Site(name).name == name


@pytest.mark.parametrize("name", ["", "..", ".hidden", "-x", "a/b", "../a", "a b", "a\n", "ä", "a\0"])
def test_another_name_is_refused(name):
    with pytest.raises(ConfigurationError, match="a site's name names its files"):
        shoal.Site(name)


@pytest.mark.parametrize(
    ("devices", "ranks", "strategy"),
    [
        (1, 1, "single"),
        (3, 3, "ddp"),
        ([4], 1, "single"),
        ([0, 2], 2, "ddp"),
        (Devices("fsdp", count=2), 2, "fsdp"),
        (Devices(), 1, "single"),
    ],
)
def test_there_is_a_rank_for_each_device(devices, ranks, strategy):
    site = shoal.Site("one", devices=devices)
    assert (site.ranks, site.spread.strategy) == (ranks, strategy)


def test_indices_mean_cuda_devices():
    spread = shoal.Site("one", devices=[0, 2]).spread
    assert (spread.accelerator, spread.ids) == ("cuda", (0, 2))


@pytest.mark.parametrize("devices", [0, -1, [], [1, 1], [-1]])
def test_devices_that_cannot_be_are_refused(devices):
    with pytest.raises(ConfigurationError):
        shoal.Site("one", devices=devices)


@pytest.mark.parametrize("config", [{"a": object()}, {"a": np.zeros(2)}, {"a": {1, 2}}])
def test_settings_that_are_no_json_are_refused(config):
    with pytest.raises(ConfigurationError, match="^config of one must be JSON: "):
        shoal.Site("one", config=config)


def test_large_settings_are_refused():
    shoal.Site("one", config={"a": "x" * ((1 << 14) - 10)})
    with pytest.raises(ConfigurationError, match="config of one has 16393 bytes, of at most 16384: give the path"):
        shoal.Site("one", config={"a": "x" * (1 << 14)})


@pytest.mark.parametrize("words", ["args", "command"])
def test_one_string_is_no_list_of_words(words):
    with pytest.raises(ConfigurationError, match=f"{words} of one is a list of words, not 'nice -n 5'"):
        shoal.Site("one", **{words: "nice -n 5"})


def test_what_decides_the_numbers_is_described_and_nothing_else():
    site = shoal.Site("one", devices=2, config={"lr": 0.1}, args=["--a"], env={"A": "1"}, command=["nice"])
    assert site.describe() == {"name": "one", "config": {"lr": 0.1}, "args": ["--a"], "ranks": 2}
    data = (np.zeros((4, 2), np.float32), np.zeros(4, np.int64))
    told = shoal.Site("one", devices=Devices("fsdp", count=2), data=data).describe()
    assert told["strategy"] == "fsdp"
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": []}, "at least one site"),
        ({"sites": [shoal.Site("a"), shoal.Site("a")]}, "two sites are called 'a'"),
        ({"min_sites": 0}, "min_sites must be from 1 to 1"),
        ({"min_sites": 2}, "min_sites must be from 1 to 1"),
        ({"on_failure": "wait"}, "on_failure must be stop, continue or restart, not 'wait'"),
        ({"max_restarts": -1}, "max_restarts must be ≥ 0"),
        ({"deadline": 0}, "deadline must be > 0 seconds"),
        ({"deadline": float("nan")}, "deadline must be > 0 seconds"),
        ({"deadline": 5}, "deadline=5 lets a round go on without some sites: .* min_sites=1"),
        ({"on_failure": "continue"}, "on_failure='continue' lets a round go on"),
        ({"settings": {"rouns": 1}}, "unknown setting of a job 'rouns'"),
        ({"settings": {"client_validation": 0.1}}, "unknown setting of a job 'client_validation'"),
        ({"script": "none.py"}, "there is no script none.py"),
        ({"script": None}, "either a script=… or a learner=…"),
        ({"model": None}, "the model=… that the sites start from is missing"),
        ({"evaluate": 1}, "evaluate=… is for a learner"),
        ({"sites": [shoal.Site("a", data=1)]}, "data of a are for a learner"),
        ({"sites": [shoal.Site("a", evaluate=1)]}, "data of a are for a learner"),
    ],
)
def test_a_job_that_cannot_be_is_refused(settings, message):
    parts = {"script": __file__, "model": {"w": np.zeros(2)}, "sites": [shoal.Site("a")], "rounds": 1} | settings
    with pytest.raises(ConfigurationError, match=message):
        shoal.Job("try", **parts)
