"""The ranks of a site train one client after the other, as one device with the same global batch does."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time

import numpy as np
import pytest
import torch

import rank_fits
from launches import Launch
from process_table import children
from rank_fits import FITS, GLOBAL_BATCH, evaluated, fitted, made
from shoal.errors import ConfigurationError
from shoal.learners.base import RankedLearner
from shoal.learners.batches import draw_order, draw_seed, part_of_rank
from support import assert_equal, learner, samples

STRATEGIES = ("ddp", "fsdp")
WORLDS = (2, 3)
EQUAL = [kind for kind in rank_fits.KINDS if kind not in ("buffers", "lbfgs", "dying")]
"""What must end as on one device."""
ALL = [*EQUAL, "buffers"]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("together")]


def launched(nursery, folder, asked, world):
    """Starts so many ranks."""
    folder.mkdir(exist_ok=True)
    return Launch(nursery, folder, [folder, json.dumps(asked)], workers=world, run="rank_fits:main")


def told(folder, rank):
    """Returns what came of everything on one rank."""
    return json.loads((folder / f"rank-{rank}.json").read_text())


@pytest.fixture(scope="module")
def results(nursery, tmp_path_factory):
    """What came of all fits on each rank, by the number of ranks."""
    asked = [(kind, strategy) for kind in [*ALL, "lbfgs"] for strategy in STRATEGIES]
    folders = {world: tmp_path_factory.mktemp(f"ranks-{world}") for world in WORLDS}
    launches = {world: launched(nursery, folders[world], asked, world) for world in WORLDS}
    for world, launch in launches.items():
        assert launch.codes(120) == [0] * world, launch.told
    return {world: [told(folders[world], rank) for rank in range(world)] for world in WORLDS}


def assert_close(ours, theirs, *, atol=1e-6):
    """Asserts that two updates are equal but for rounding."""
    assert ours["weight"] == theirs["weight"]
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5, abs=1e-6)
    for part in ("delta", "buffers"):
        assert ours[part].keys() == theirs[part].keys()
        for name in theirs[part]:
            np.testing.assert_allclose(ours[part][name], theirs[part][name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
class TestTogether:
    @pytest.mark.parametrize("kind", EQUAL)
    def test_give_the_update_of_one_device(self, results, world, strategy, kind):
        one = made(kind)
        for ours, fit in zip(results[world][0][f"{kind}, {strategy}"]["fits"], FITS, strict=True):
            theirs = fitted(one, one, fit)
            assert max(np.abs(array).max() for array in theirs["delta"].values()) > 1e-3
            assert_close(ours, theirs)

    @pytest.mark.parametrize("kind", ALL)
    def test_measure_the_same_bits_as_one_device(self, results, world, strategy, kind):
        one = made(kind)
        assert results[world][0][f"{kind}, {strategy}"]["evaluations"] == [evaluated(one, one, fit) for fit in FITS]

    @pytest.mark.parametrize("kind", ALL)
    def test_all_get_the_whole_result(self, results, world, strategy, kind):
        first, *others = ({**found[f"{kind}, {strategy}"]} for found in results[world])
        for other in others:
            for ours, theirs in zip(other["fits"], first["fits"], strict=True):
                assert {**ours, "noise": 0} == {**theirs, "noise": 0}
            assert other["evaluations"] == first["evaluations"]

    @pytest.mark.parametrize("kind", ALL)
    def test_leave_nothing_of_one_fit_for_the_next(self, results, world, strategy, kind):
        found = results[world][0][f"{kind}, {strategy}"]
        first, second, *_, last = found["fits"]
        assert_close(last, first)  # ddp sends its gradients in another order from its second step on
        assert found["again"] == second  # after refusals and evaluations

    @pytest.mark.parametrize("kind", ALL)
    def test_meet_once(self, results, world, strategy, kind):
        for found in results[world]:
            first, last = found[f"{kind}, {strategy}"]["made"]
            assert first == last
            assert first["init_process_group"] == 1
            assert first["DistributedDataParallel" if strategy == "ddp" else "fully_shard"] >= 1
            assert not found[f"{kind}, {strategy}"]["left"]

    def test_give_the_buffers_of_rank_0(self, results, world, strategy):
        """At a rate of 0 they are the running statistics of that rank's part of each batch."""
        one = made("buffers")
        for ours, fit in zip(results[world][0][f"buffers, {strategy}"]["fits"], FITS, strict=True):
            before = one.init(fit["model"])
            rng = np.random.default_rng(5)
            draw_seed(rng)
            data, sizes = samples(fit["examples"]), one.batch_sizes(fit["examples"])
            order = draw_order(len(data), sum(sizes), rng)
            steps, own = part_of_rank(order, sizes, batch_size=GLOBAL_BATCH, ranks=world, rank=0)
            module = one.resident.module.train()
            for part in np.split(own, np.cumsum([piece.computed for (piece,) in steps])[:-1]):
                module(one.batch(data, part)[0])
            assert ours["buffers"].keys() == {"1.running_mean", "1.running_var"}
            for name, array in one.resident.delta(before)[1].items():
                np.testing.assert_allclose(ours["buffers"][name], array, rtol=0, atol=1e-6)

    def test_have_noise_of_their_own(self, results, world, strategy):
        of_ranks = [found[f"noise, {strategy}"]["fits"][0]["noise"] for found in results[world]]
        assert all(len(noise) == 4 for noise in of_ranks)
        assert len({number for noise in of_ranks for number in noise}) == 4 * world

    def test_refuse_what_they_cannot_do(self, results, world, strategy):
        for found in results[world]:
            assert found[f"plain, {strategy}"]["refused"] == [
                ["DataError", f"{world - 1} examples cannot be divided among {world} devices: use fewer"],
                ["DataError", "there is no example to evaluate on"],
            ]
            assert found[f"lbfgs, {strategy}"]["error"] == "ConfigurationError"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ALL)
def test_fsdp_is_ddp_in_parts(results, world, kind):
    parts, copies = (results[world][0][f"{kind}, {strategy}"] for strategy in ("fsdp", "ddp"))
    for one, other in zip(parts["fits"], copies["fits"], strict=True):
        assert_close(one, other)
        assert one["noise"] == other["noise"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_that_dies_ends_the_others(nursery, tmp_path, strategy):
    launch = launched(nursery, tmp_path, [("dying", strategy)], 2)
    started = time.monotonic()
    assert launch.codes(30) == [0, -signal.SIGKILL], launch.told
    assert time.monotonic() - started < 20
    found = told(tmp_path, 0)[f"dying, {strategy}"]
    assert found["error"] == "WorkerError"
    assert found["message"].startswith("another rank is gone")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["plain", "buffers"])
def test_one_rank_is_one_device(strategy, kind):
    """And the learner's own model is not the one that is spread."""
    ranked, one = made(kind, strategy), made(kind)
    with ranked.together() as trainer:
        ours = [fitted(trainer, ranked, fit) for fit in FITS]
        assert evaluated(trainer, ranked, FITS[0]) == evaluated(one, one, FITS[0])
    theirs = [fitted(one, one, fit) for fit in FITS]
    for left, right in zip(ours, theirs, strict=True):
        assert_close(left, right)
    assert fitted(ranked, ranked, FITS[1]) == theirs[1]
    assert not torch.distributed.is_initialized()


def test_batches_may_be_read_ahead():
    one, before = made("plain"), children(os.getpid())
    with dataclasses.replace(made("plain", "ddp"), workers=1).together() as trainer:
        for fit in FITS[:2]:
            assert_close(fitted(trainer, one, fit), fitted(one, one, fit))
        assert evaluated(trainer, one, FITS[0]) == evaluated(one, one, FITS[0])
    assert children(os.getpid()) == before


def test_one_device_needs_no_ranks(monkeypatch):
    one = learner()
    assert isinstance(one, RankedLearner)
    with one.together() as trainer:
        assert trainer is one
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigurationError, match="2 processes were started, and strategy 'single' has one"),
        one.together(),
    ):
        raise AssertionError


def test_a_fit_leaves_what_it_was_sent_as_it_was():
    """What a caller gives stays its own, also where a tensor of it could be taken as it is."""
    ranked = made("plain", "ddp")
    sent = rank_fits.broadcast(ranked, FITS[1])
    before = {name: array.clone() for name, array in sent.model.params.items()}
    with ranked.together() as trainer:
        trainer.fit(sent, samples(20), np.random.default_rng(1))
    assert_equal(sent.model.params, before)
