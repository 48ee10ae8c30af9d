from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.deploy.private_site import write_site
from shoal.deploy.site_settings import LARGEST, SETTINGS, Allowed, Limits, SiteSettings, settings_text
from shoal.errors import ConfigurationError

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(1, LARGEST) | st.floats(0, LARGEST, exclude_min=True, allow_subnormal=False)
values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
experiments = st.builds(
    Allowed,
    name=names,
    source=st.just("/") .flatmap(lambda root: names.map(lambda name: f"{root}{name}.py")) | st.just("digits"),
    settings=st.lists(words, max_size=3).map(tuple),
    devices=st.none() | st.integers(1, 8) | st.lists(st.integers(0, 7), min_size=1, max_size=3),
    accelerator=st.sampled_from(["auto", "cpu", "cuda"]),
    config=st.dictionaries(words, values, max_size=3),
    same_version=st.booleans(),
)  # fmt: skip
limits = st.builds(Limits, rounds=st.integers(1, 10**6), seconds=numbers, megabytes=numbers, idle=numbers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("site")


@given(name=names, allowed=st.lists(experiments, min_size=1, max_size=3, unique_by=lambda each: each.name), most=limits)
def test_what_is_written_is_read(folder, name, allowed, most):
    (folder / SETTINGS).write_text(settings_text(name, allowed, most), encoding="utf-8")
    found = SiteSettings.read(folder)
    assert found == SiteSettings(name=name, allowed={each.name: each for each in allowed}, limits=most)


def read(folder, text):
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    return SiteSettings.read(folder)


MORE = "\n[experiments.digits]\n"

WRONG = {
    "no TOML": ("name = ", "is no TOML"),
    "binary": ("\0\1", "is no TOML"),
    "no name": ("[experiments.digits]", 'has no name: add name = "site-1"'),
    "no good name": ('name = "site 1"' + MORE, "is not 'site 1'"),
    "no experiment": ('name = "site-1"', r"allows no experiment: add \[experiments.NAME\]"),
    "an unknown key": ('name = "site-1"\nlimit = 3' + MORE, "unknown key of .*'limit'; did you mean 'limits'"),
    "an unknown limit": ('name = "site-1"\n[limits]\nround = 3' + MORE, r"key of \[limits\] .*did you mean 'rounds'"),
    "an unknown setting": ('name = "site-1"' + MORE + "setings = []", r"key of \[experiments.digits\] .*'settings'"),
    "limits that are none": ('name = "site-1"\nlimits = 3' + MORE, r"\[limits\] of .* must be a table, not 3"),
    "experiments that are none": ('name = "site-1"\nexperiments = ["digits"]', r"\[experiments\] .* must be a table"),
    "an experiment that is none": ('name = "site-1"\n[experiments]\ndigits = true', "must be a table under a plain"),
    "an experiment's name": ('name = "site-1"\n[experiments."../x"]', "must be a table under a plain name"),
    "a limit of nothing": ('name = "site-1"\n[limits]\nrounds = 0' + MORE, "limits.rounds must be a number > 0"),
    "an endless limit": ('name = "site-1"\n[limits]\nseconds = inf' + MORE, "limits.seconds must be a number > 0"),
    "a limit of NaN": ('name = "site-1"\n[limits]\nidle = nan' + MORE, "limits.idle must be a number > 0"),
    "true for a limit": ('name = "site-1"\n[limits]\nidle = true' + MORE, "limits.idle must be a number > 0"),
    "a text for a limit": ('name = "site-1"\n[limits]\nidle = "9"' + MORE, "limits.idle must be a number > 0"),
    "a number as source": ('name = "site-1"' + MORE + "source = 3", "source in .* must be a text, not 3"),
    "a number as setting": ('name = "site-1"' + MORE + "settings = [3]", "settings in .* must be a list of texts"),
    "no devices": ('name = "site-1"' + MORE + "devices = 0", "devices in .* must be a number ≥ 1"),
    "devices that are none": ('name = "site-1"' + MORE + 'devices = "two"', "devices in .* must be a number ≥ 1"),
    "an accelerator": ('name = "site-1"' + MORE + 'accelerator = "gpu"', "must be auto, cpu or cuda, not 'gpu'"),
    "a config that is none": ('name = "site-1"' + MORE + "config = 3", "config in .* must be a table"),
    "a text for true": ('name = "site-1"' + MORE + 'same_version = "no"', "must be true or false, not 'no'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(tmp_path, kind):
    text, what = WRONG[kind]
    with pytest.raises(ConfigurationError, match=what) as raised:
        read(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_a_folder_without_settings_is_told_what_to_write(tmp_path):
    with pytest.raises(ConfigurationError, match='write one with name = "site-1"'):
        SiteSettings.read(tmp_path)


def test_what_is_left_out_has_its_default(tmp_path):
    found = read(tmp_path, 'name = "site-1"\n[experiments.digits]')
    assert found.limits == Limits()
    assert found.allowed == {"digits": Allowed(name="digits", source="digits")}


def test_paths_are_meant_from_where_the_file_is(tmp_path, monkeypatch):
    site, other = tmp_path / "site", tmp_path / "other"
    for each in (site / "job", site / "digits", other / "job"):
        each.mkdir(parents=True)
    (site / "job" / "job.json").touch()
    (other / "job" / "job.json").touch()
    monkeypatch.chdir(other)
    sources = {"file": "mine.py", "up": "../other/yours.py", "job": "job", "digits": "digits", "far": "/a/b.py"}
    lines = "\n".join(f'[experiments.{name}]\nsource = "{source}"' for name, source in sources.items())
    found = read(site, f'name = "site-1"\n{lines}').allowed
    assert {name: each.source for name, each in found.items()} == {
        "file": str(site / "mine.py"),
        "up": str(other / "yours.py"),
        "job": str(site / "job"),
        "digits": "digits",  # a folder that is no job has no say
        "far": "/a/b.py",
    }


def test_which_settings_a_server_may_choose():
    closed = Allowed(name="digits", source="digits", settings=("lr", "rounds"))
    assert closed.refusal({"lr": "1"}) is None
    assert closed.refusal({}) is None
    told = closed.refusal({"lr": "1", "learner.devices": "8", "seed": "3"})
    assert told is not None
    assert "does not let a server set learner.devices, seed of digits" in told
    assert 'settings = ["learner.devices"]' in told
    assert Allowed(name="digits", source="digits", settings=("*",)).refusal({"anything": "1"}) is None


def test_one_setting_needs_no_list(tmp_path):
    assert read(tmp_path, 'name = "a"\n[experiments.digits]\nsettings = "*"').allowed["digits"].settings == ("*",)


def test_sites_that_shoal_writes_can_be_read(tmp_path):
    command = write_site(tmp_path / "a" / "site-1", "site-1", [Allowed(name="digits", source="digits")])
    assert command[-2:] == ["site", str(tmp_path / "a" / "site-1")]
    assert SiteSettings.read(tmp_path / "a" / "site-1").name == "site-1"
    assert tomllib.loads((tmp_path / "a" / "site-1" / SETTINGS).read_text())["limits"]["idle"] < Limits().idle
