"""Everything about recorded blocks but the recording: a stand-in runs the program again, into the same tensors."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import shoal
from models import MODELS, batch_norm, dropout, images
from shoal.data.dataset import Subset
from shoal.engines import VectorizedEngine
from shoal.learners import torch_graphs
from shoal.learners.torch_graphs import Recorded, Recordings
from shoal.learners.torch_samples import ResidentSamples
from shoal.learners.torch_stackable import find_stacking
from shoal.learners.torch_stacked import StackedTrainer
from shoal.learners.torch_stacked_optimizer import RECORDABLE, optimizer_settings
from shoal.randomness import generator
from shoal.types import Broadcast, LocalObjective, ModelState
from support import Mlp, assert_equal, learner, population, samples

USUAL, REPLAYED = "grouped", "grouped, recorded"


class Rerun:
    """Runs a program again, into the same tensors, which hold nothing until then: as a graph does."""

    def __init__(self):
        self.replays = 0
        self.made = []

    def rehearse(self, program):
        return program(), None

    def record(self, program):
        results = {name: torch.zeros_like(tensor) for name, tensor in program().items()}
        self.made.append(weakref.ref(next(iter(results.values()))))

        def replay():
            self.replays += 1
            for name, tensor in program().items():
                results[name].copy_(tensor)

        return Recorded(replay, results)

    @property
    def held(self):
        gc.collect()
        return sum(made() is not None for made in self.made)


def trainer(ours, data, recorder=None):
    return StackedTrainer(ours, find_stacking(ours, data), recorder)


def block(clients, rows, round):
    return [(clients[k], generator(round, "fit", client=k)) for k in rows]


def broadcasts(ours, count, *, proximal=0.0, corrected=False):
    """Returns the broadcasts of a few rounds, no number of which is that of another round."""
    start = ours.init(0)
    for round in range(1, count + 1):
        noise = torch.Generator().manual_seed(round)

        def moved(tree, noise=noise):
            return {name: array + 0.01 * torch.rand(array.shape, generator=noise) for name, array in tree.items()}

        model = ModelState(params=moved(start.params), buffers=moved(start.buffers), constants=start.constants)
        correction = moved({n: torch.zeros_like(p) for n, p in start.params.items()}) if corrected else None
        yield Broadcast(round=round, model=model, objective=LocalObjective(proximal=proximal, correction=correction))


def copied(update):
    told = {"delta": update.delta, "buffers": update.buffers, "metrics": update.metrics}
    return shoal.trees.copy(shoal.trees.flatten({**told, "all": {"finite": update.finite}}))


def assert_replays_equal(make, clients, *, rounds=6, blocks=((0, 1, 2, 3, 4), (5, 6)), **objective):
    """Asserts that blocks end with the same bits when they are replayed, and that all are in the end."""
    recorder, plain, other = Rerun(), make(), make()
    ours, theirs = trainer(plain, clients.dataset), trainer(other, clients.dataset, recorder)
    assert theirs.variants == (USUAL, REPLAYED)
    replayed = 0
    for one, two in zip(broadcasts(plain, rounds, **objective), broadcasts(other, rounds, **objective), strict=True):
        for rows in blocks:
            expected = copied(ours.fit(one, block(clients, rows, one.round), USUAL))
            before = recorder.replays
            found = copied(theirs.fit(two, block(clients, rows, one.round), REPLAYED))
            assert_equal(found, expected)
            assert theirs.warming_up == (one.round <= 3)
            replayed += recorder.replays - before
    assert replayed == (rounds - 2) * len(blocks)
    return recorder


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("mlp", torch.optim.SGD),
        ("mlp", torch.optim.AdamW),
        ("batch_norm", partial(torch.optim.SGD, momentum=0.9)),
        ("batch_norm", torch.optim.AdamW),
        ("transformer", torch.optim.AdamW),
        ("lstm", partial(torch.optim.SGD, momentum=0.9)),
    ],
)
def test_a_replay_ends_with_the_bits_of_the_block_itself(model, optimizer):
    clients = images((9,) * 7)
    make = partial(learner, MODELS[model], optimizer=partial(optimizer, lr=0.05), epochs=2, train_metrics=True)
    assert_replays_equal(make, clients, proximal=0.3, corrected=True)


def test_clipped_blocks_in_bf16_and_a_frozen_base_that_changes_are_replayed():
    class Frozen(Mlp):
        def __init__(self):
            super().__init__()
            self[0].requires_grad_(False)

    clients = population((8,) * 7)
    make = partial(learner, Frozen, clip_norm=0.05, devices=shoal.Devices(accelerator="cpu", precision="bf16"))
    assert_replays_equal(make, clients)
    recorder, ours = Rerun(), learner(Frozen)
    replayed, start = trainer(ours, clients.dataset, recorder), ours.init(0)
    for round in range(1, 6):  # read in place, so what a round sends must be there
        constants = {name: array + round for name, array in start.constants.items()}
        broadcast = Broadcast(round=round, model=ModelState(params=start.params, constants=constants))
        found = copied(replayed.fit(broadcast, block(clients, range(5), 1), REPLAYED))
        assert_equal(found, copied(replayed.fit(broadcast, block(clients, range(5), 1), USUAL)))
    assert recorder.replays == 3


@pytest.mark.parametrize("kind", RECORDABLE, ids=lambda kind: kind.__name__)
def test_each_optimizer_that_counts_on_the_host_is_replayed(kind):
    make = partial(learner, optimizer=partial(kind, lr=0.01), epochs=4)
    assert_replays_equal(make, population((8,) * 7), rounds=4, blocks=(range(5),))


def test_what_a_round_reads_at_its_end_outlives_the_next_replay():
    ours, clients = learner(), population((8,) * 10)
    recorded = trainer(ours, clients.dataset, Rerun())
    (broadcast,) = broadcasts(ours, 1)
    for _ in range(3):
        recorded.fit(broadcast, block(clients, range(5), 0), REPLAYED)
    update = recorded.fit(broadcast, block(clients, range(5), 1), REPLAYED)
    kept = update.finite.clone(), update.metrics["loss"].clone()
    nothing = ModelState(params={name: p * float("nan") for name, p in broadcast.model.params.items()})
    after = recorded.fit(Broadcast(round=2, model=nothing), block(clients, range(5, 10), 1), REPLAYED)
    assert not after.finite.any()
    assert not after.delta["0.weight"].any()
    assert torch.equal(update.finite, kept[0])
    assert torch.equal(update.metrics["loss"], kept[1])


class Failing(Rerun):
    def record(self, program):
        error = RuntimeError("operation failed due to a previous error")
        error.__context__ = RuntimeError("operation not permitted\nwhen stream is capturing")
        raise error


class Broken(Failing):
    def record(self, program):
        recorded = Rerun.record(self, program)

        def replay():
            raise RuntimeError("it cannot be launched")

        return Recorded(replay, recorded.results)


class Waiting(Rerun):
    def rehearse(self, program):
        return program(), "a step waits"


class Stale(Rerun):
    """Comes to the same each time, whatever the inputs are by then."""

    def record(self, program):
        return Recorded(lambda: None, {name: tensor.clone() for name, tensor in program().items()})


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Failing, "RuntimeError: operation not permitted; RuntimeError: operation failed due to a previous error"),
        (Broken, "RuntimeError: it cannot be launched"),
        (Waiting, "a step waits"),
        (Stale, "a replay gives another delta/"),
    ],
)
def test_a_recorder_that_fails_or_lies_costs_nothing_but_a_line(recorder, reason, caplog):
    caplog.set_level(logging.WARNING, "shoal")
    ours, theirs, clients = learner(), learner(), population((8,) * 7)
    plain, recorded = trainer(ours, clients.dataset), trainer(theirs, clients.dataset, recorder())
    for one, two in zip(broadcasts(ours, 5), broadcasts(theirs, 5), strict=True):
        for rows in ((0, 1, 2, 3), (4, 5, 6)):
            expected = copied(plain.fit(one, block(clients, rows, one.round), USUAL))
            assert_equal(copied(recorded.fit(two, block(clients, rows, one.round), REPLAYED)), expected)
    assert recorded.variants == recorded.equal_variants == (USUAL,)
    assert not recorded.warming_up
    assert caplog.text.count("blocks are not recorded as CUDA graphs, and run as before: " + reason) == 1
    assert len(caplog.records) == 1


def test_noise_and_optimizers_that_read_from_the_device_are_not_recorded():
    data = images((9,) * 4).dataset
    assert trainer(learner(dropout), data, Rerun()).variants == (USUAL,)
    data = samples(60)
    assert trainer(learner(optimizer=partial(torch.optim.ASGD, lr=0.1)), data, Rerun()).variants == (USUAL,)
    tensor = partial(torch.optim.SGD, lr=torch.tensor(0.1))
    assert trainer(learner(optimizer=tensor), data, Rerun()).variants == (USUAL,)


@pytest.mark.parametrize("case", ["unequal", "padded", "not resident", "long"])
def test_blocks_of_other_kinds_run_as_they_are(case, monkeypatch):
    sizes = (8,) * 4
    if case == "unequal":
        sizes = (10, 8, 10, 8)
        ours = learner(lambda: torch.nn.Sequential(Mlp(), torch.nn.BatchNorm1d(3)))
    else:
        ours = learner(epochs=200 if case == "long" else 1)
    if case == "padded":
        sizes = (9, 8, 9, 8)
    clients = population(sizes)
    if case == "not resident":
        monkeypatch.setattr(ResidentSamples, "of", lambda self, datasets: None)
    recorder = Rerun()
    recorded = trainer(ours, clients.dataset, recorder)
    for broadcast in broadcasts(ours, 4):
        update = recorded.fit(broadcast, block(clients, range(4), 1), REPLAYED)
        assert update.finite.all()
        assert not recorded.warming_up
    assert recorder.made == []


def test_a_setting_that_changes_is_another_program():
    rates, clients = iter(np.linspace(0.1, 0.3, 500)), population((8,) * 4)
    ours = learner(optimizer=lambda params: torch.optim.SGD(params, lr=float(next(rates))))
    recorder = Rerun()
    recorded = trainer(ours, clients.dataset, recorder)
    for broadcast in broadcasts(ours, 5):
        recorded.fit(broadcast, block(clients, range(4), 1), REPLAYED)
    assert recorder.made == []
    settings = [optimizer_settings(torch.optim.Adam([torch.zeros(1)], betas=(0.9, b))) for b in (0.99, 0.99, 0.999)]
    assert settings[0] == settings[1] != settings[2]


def test_an_objective_that_changes_is_another_program():
    ours, theirs, clients, recorder = learner(), learner(), population((8,) * 4), Rerun()
    plain, recorded = trainer(ours, clients.dataset), trainer(theirs, clients.dataset, recorder)
    names = ours.init(0).params
    terms = [
        LocalObjective(proximal=proximal, correction={name: torch.ones(()) for name in corrected})
        for proximal, corrected in ((0.0, ()), (0.5, ()), (2.0, ()), (2.0, names), (2.0, list(names)[:2]))
    ]
    # The start is the same for all, so that nothing but the objective tells them apart.
    (one,), (two,) = broadcasts(ours, 1), broadcasts(theirs, 1)
    for objective in terms * 4:
        expected = copied(plain.fit(replace(one, objective=objective), block(clients, range(4), 1), USUAL))
        found = recorded.fit(replace(two, objective=objective), block(clients, range(4), 1), REPLAYED)
        assert_equal(copied(found), expected)
    assert recorder.replays == torch_graphs.MOST * 2


def replaying(recorder, **settings):
    """Returns a trainer that replays, and what runs another block."""
    ours, clients = learner(**settings), population((8,) * 7)
    recorded = trainer(ours, clients.dataset, recorder)
    broadcast = Broadcast(round=1, model=ours.init(0))

    def fit(variant=REPLAYED, rows=range(5)):
        recorded.fit(broadcast, block(clients, rows, 1), variant)

    for _ in range(3):
        fit()
    assert recorder.held == 1
    return ours, recorded, fit


def test_memory_is_let_go_of_when_another_variant_is_chosen():
    recorder = Rerun()
    _, recorded, fit = replaying(recorder)
    recorded.settle(REPLAYED)
    assert recorder.held == 1
    recorded.settle(USUAL)
    assert recorder.held == 0
    for _ in range(3):
        fit()
    recorded.settle("matmul, recorded")
    assert recorder.held == 0


def test_memory_is_let_go_of_when_a_block_does_not_fit(monkeypatch):
    recorder = Rerun()
    _, _, fit = replaying(recorder)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StackedTrainer, "_run", full)
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        fit(USUAL)
    assert recorder.held == 0


def test_recordings_that_leave_no_room_for_the_block_itself_go_and_the_block_is_not_lost(monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "shoal")
    recorder = Rerun()
    _, recorded, fit = replaying(recorder)
    run, room = StackedTrainer._run, []

    def tight(self, start, work, pool):
        room.append(recorder.held == 0)
        if not room[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, start, work, pool)

    monkeypatch.setattr(StackedTrainer, "_run", tight)
    fit(rows=range(3))
    assert room == [False, True]
    assert recorded.variants == (USUAL,)
    assert "their memory leaves too little for the blocks" in caplog.text


def test_recordings_do_not_outlive_the_model_or_the_data_that_they_read():
    recorder = Rerun()
    ours, recorded, fit = replaying(recorder)
    model = ours.init(1)  # another module
    fit()
    assert recorder.held == 0
    fit()
    fit()
    assert recorder.held == 1
    others = population((8,) * 7, seed=1)
    recorded.fit(Broadcast(round=2, model=model), block(others, range(5), 1), REPLAYED)
    assert recorder.held == 0


def test_there_are_never_more_than_a_few_and_the_rest_run_as_they_are():
    recorder = Rerun()
    _, recorded, fit = replaying(recorder)
    for _ in range(3):
        for clients in range(1, 7):
            fit(rows=range(clients))
    assert recorder.held == torch_graphs.MOST
    fit(rows=range(6))
    assert not recorded.warming_up
    del recorded, fit
    assert recorder.held == 0


def test_what_waits_for_the_device_is_heard_and_other_warnings_go_on(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def watched():
        with torch_graphs._watched() as waits:
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            warnings.warn("the user's own", RuntimeWarning, stacklevel=1)
            assert modes == ["default", "warn"]
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        return waits

    with pytest.warns(RuntimeWarning, match="the user's own"):
        assert len(watched()) == 1
    assert modes == ["default", "warn", "default"]


@pytest.mark.parametrize("ended", [True, False])
def test_memory_of_a_failed_capture_is_given_back_once(ended, monkeypatch):
    told = []

    def end(device, pool):
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        told.append(("end", device, pool))

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    release = lambda device, pool: told.append(("release", device, pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    torch_graphs._end_allocation(torch.device("cuda", 1), (0, 7))
    assert told == ([] if ended else [("end", 1, (0, 7)), ("release", 1, (0, 7))])


def test_evaluation_leaves_the_training_data_where_they_are():
    train, test, third = samples(20), samples(10, seed=1), samples(10, seed=2)
    resident = ResidentSamples(torch.device("cpu"))
    first = resident.of([train])
    assert resident.of([test]) is not first
    assert resident.of([Subset(train, np.arange(3))]) is first
    resident.of([third])
    assert resident.of([train]) is first
    kept = weakref.ref(resident.of([test])[0])
    resident.of([train])
    resident.of([third])
    gc.collect()
    assert kept() is None


def record_with(recorder, monkeypatch):
    monkeypatch.setattr(shoal.learners.torch, "StackedTrainer", partial(StackedTrainer, recorder=recorder))
    return recorder


def faster(monkeypatch, variant):
    """Lets blocks of one variant take no time by the engine's clock."""
    now, fit = [0.0], StackedTrainer.fit

    def timed(self, broadcast, clients, kind):
        now[0] += 0.0 if kind == variant else 1.0
        return fit(self, broadcast, clients, kind)

    monkeypatch.setattr(StackedTrainer, "fit", timed)
    monkeypatch.setattr("shoal.engines.vectorized.time", SimpleNamespace(perf_counter=lambda: now[0]))


@pytest.mark.parametrize("chosen", [USUAL, REPLAYED])
def test_the_engine_chooses_by_the_clock_and_the_choice_leaves_no_trace(chosen, monkeypatch):
    clients = images((9,) * 25)
    settings = {"rounds": 8, "cohort": 25, "algorithm": shoal.FedProx(mu=0.1), "evaluate": images((30,)).dataset}
    expected = shoal.federate(learner(batch_norm), clients, engine="vectorized", **settings)
    rerun = record_with(Rerun(), monkeypatch)
    faster(monkeypatch, chosen)
    engine = VectorizedEngine()
    found = shoal.federate(learner(batch_norm), clients, engine=engine, **settings)
    assert engine.found_variant == chosen
    assert_equal(found.params, expected.params)
    assert rerun.held == 0  # the engine is closed
    # Of either block of a round two replays are checked, and three in all are measured.
    assert rerun.replays == {USUAL: 5, REPLAYED: 9}[chosen]


def test_the_engine_leaves_a_variant_that_fails(monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "shoal")
    record_with(Failing(), monkeypatch)
    faster(monkeypatch, REPLAYED)
    engine = VectorizedEngine(block_size=5)
    shoal.federate(learner(), population((8,) * 10), rounds=4, cohort=10, engine=engine)
    assert engine.settled
    assert engine.found_variant == USUAL
    assert caplog.text.count("not recorded") == 1


def test_a_recording_that_is_off_by_more_than_rounding_is_wrong():
    def run(off, dtype=torch.float32):
        class Off(Rerun):
            def record(self, program):
                recorded = super().record(program)
                return Recorded(lambda: (recorded.replay(), recorded.results["x"].mul_(off)), recorded.results)

        recordings = Recordings(Off(), dtype)
        for number in range(4):
            inputs = {"x": torch.tensor([float(number), float("nan"), float("inf"), -2.0])}

            def program(arrays):
                return {"x": arrays["x"] * 2, "finite": arrays["x"].isfinite()}

            recordings.run("key", program, inputs, plain=lambda i=inputs, p=program: p(i))
        return recordings.refusal

    assert run(1.0) is run(1.0001) is run(1.01, torch.bfloat16) is None
    assert run(1.001) == run(1.5, torch.bfloat16) == "a replay gives another x"
