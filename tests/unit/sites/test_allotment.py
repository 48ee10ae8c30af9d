from __future__ import annotations

import pytest

import shoal
from shoal.devices import Devices
from shoal.errors import ConfigurationError
from shoal.sites import allotment
from shoal.sites.allotment import VISIBLE, Allotment


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine have CUDA devices."""
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def have(count, visible=None):
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        if visible is not None:
            monkeypatch.setenv(VISIBLE, visible)

    have(0)
    return have


def visible(*devices, **settings):
    """Returns what each of the sites sees."""
    sites = [shoal.Site(f"site-{number}", devices=own) for number, own in enumerate(devices, 1)]
    return [env.get(VISIBLE) for env in Allotment(**settings).environments(sites)]


def test_devices_are_divided_without_overlap(machine):
    machine(4)
    assert visible(2, 1, 1) == ["0,1", "2", "3"]
    assert visible([3], 1, [1, 2]) == ["3", "0", "1,2"]


def test_only_devices_that_this_process_may_see_are_given(machine):
    machine(3, "7,2,GPU-5a")
    assert visible(1, 2) == ["7", "2,GPU-5a"]
    assert visible([1], [0]) == ["2", "7"]


def test_the_order_of_sites_decides_nothing_where_one_names_its_devices(machine):
    machine(2)
    assert visible(1, [0]) == ["1", "0"]


def test_too_few_devices_are_refused(machine):
    machine(3)
    with pytest.raises(ConfigurationError, match="site-2 wants 2 CUDA devices, and of 3 on this machine 1 are free"):
        visible(2, 2)
    with pytest.raises(ConfigurationError, match="site-1 names CUDA device 3, and this machine has 3"):
        visible([3])


def test_an_overlap_must_be_asked_for(machine):
    machine(2)
    with pytest.raises(ConfigurationError, match="site-2 and site-1 both have CUDA device 1: .*share_devices=True"):
        visible([0, 1], [1])
    assert visible([0, 1], [1], share_devices=True) == ["0,1", "1"]
    assert visible(2, 2, share_devices=True) == ["0,1", "0,1"]


def test_sharing_gives_no_more_than_there_are(machine):
    machine(1)
    with pytest.raises(ConfigurationError, match="wants 2 CUDA devices"):
        visible(2, share_devices=True)


def test_without_cuda_sites_are_on_the_cpu(machine):
    for devices in ((1, 2), (Devices("ddp", count=2, accelerator="cpu"), 1)):
        assert all(not own for own in visible(*devices))
    with pytest.raises(ConfigurationError, match="site-1 wants 1 CUDA devices"):
        visible(1, accelerator="cuda")
    with pytest.raises(ConfigurationError, match="site-1 names CUDA device 0, and this machine has 0"):
        visible([0])


def test_a_site_on_the_cpu_sees_no_device(machine):
    machine(2)
    assert visible(Devices("ddp", count=2, accelerator="cpu"), 1) == ["", "0"]
    assert visible(1, 1, accelerator="cpu") == ["", ""]
    assert visible(1, Devices(accelerator="cuda"), accelerator="cpu") == ["", "0"]


def test_the_cores_are_divided_among_all_ranks(machine, monkeypatch):
    monkeypatch.setattr(allotment, "cores_each", lambda count: 12 // count)
    sites = [shoal.Site("a", devices=2), shoal.Site("b")]
    assert [env["OMP_NUM_THREADS"] for env in Allotment(accelerator="cpu").environments(sites)] == ["4", "4"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert [env["OMP_NUM_THREADS"] for env in Allotment(accelerator="cpu").environments(sites)] == ["7", "7"]


def test_one_process_with_several_devices_has_as_many_of_its_own(machine):
    machine(4)
    assert visible(Devices("mirrored", count=2), Devices("dp", count=2)) == ["0,1", "2,3"]
    assert visible(Devices("multiworker", count=3), 1) == ["0,1,2", "3"]
    with pytest.raises(ConfigurationError, match="site-2 wants 2 CUDA devices, and of 4 on this machine 1 are free"):
        visible(Devices("mirrored", count=3), Devices("mirrored", count=2))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "dp", "mirrored", "multiworker"])
def test_a_site_says_how_many_devices_it_has(strategy):
    with pytest.raises(ConfigurationError, match=f"site-1 does not say how many .*: Devices\\('{strategy}', count=…"):
        shoal.Site("site-1", devices=Devices(strategy))


def test_tensorflow_has_as_many_threads_as_torch(machine, monkeypatch):
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    monkeypatch.setattr(allotment, "cores_each", lambda count: 12 // count)
    [env] = Allotment(accelerator="cpu").environments([shoal.Site("a", devices=2)])
    assert env["TF_NUM_INTRAOP_THREADS"] == env["OMP_NUM_THREADS"] == "6"
