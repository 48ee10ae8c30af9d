from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import shoal
from shoal.data import ArrayDataset, Population
from shoal.engines import VectorizedEngine, choose_engine
from shoal.errors import CannotStackError, ClientError, ConfigurationError
from shoal.learners.torch_blocks import BlockData
from shoal.types import Broadcast
from support import BatchNormNet, Mlp, assert_equal, learner, population, samples, tasks


def blocks(engine, ours, clients):
    """Returns the clients of each block, and every client's delta."""
    engine.open(ours, clients)
    found, deltas = [], {}
    for result in engine.run(ours, Broadcast(round=1, model=ours.init(0)), tasks(clients, range(len(clients)))):
        found.append(list(result.clients))
        for row, client in enumerate(result.clients):
            deltas[client] = {name: array.clone() for name, array in result.updates.row(row).delta.items()}
    return found, deltas


class NeedsRoom:
    """Refuses blocks of more than so many clients, as a device does that is too small."""

    def __init__(self, trainer, most):
        self.trainer = trainer
        self.most = most

    def __getattr__(self, name):
        return getattr(self.trainer, name)

    def fit(self, broadcast, clients, variant):
        if len(clients) > self.most:
            raise MemoryError("too large")
        return self.trainer.fit(broadcast, clients, variant)


@pytest.mark.parametrize("most", [1, 3])
def test_a_block_that_does_not_fit_is_halved_and_nothing_is_lost(most, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "shoal")
    ours = learner()
    whole = blocks(VectorizedEngine(block_size=8), ours, population((8,) * 12))[1]
    stacked = ours.stacked
    monkeypatch.setattr(type(ours), "stacked", lambda _, dataset: NeedsRoom(stacked(dataset), most))
    found, halved = blocks(VectorizedEngine(block_size=8), ours, population((8,) * 12))
    assert sorted(client for block in found for client in block) == list(range(12))
    assert max(len(block) for block in found) <= most
    assert "does not fit the device: halved" in caplog.text
    for client, delta in whole.items():
        assert_equal(halved[client], delta, atol=1e-7)


def test_a_client_that_fits_in_no_way_fails_alone(monkeypatch):
    ours = learner()
    stacked = ours.stacked
    monkeypatch.setattr(type(ours), "stacked", lambda _, dataset: NeedsRoom(stacked(dataset), 0))
    with pytest.raises(ClientError, match="MemoryError: too large"):
        shoal.federate(ours, population(), rounds=1, engine="vectorized")


class Branches(Mlp):
    def forward(self, inputs):
        return super().forward(inputs) if inputs.sum() > 0 else super().forward(-inputs)


class Reads(Mlp):
    def forward(self, inputs):
        return super().forward(inputs) * inputs.mean().item()


class Draws(Mlp):
    def forward(self, inputs):
        return super().forward(inputs + torch.randn_like(inputs))


class Packs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = torch.nn.GRU(2, 4, batch_first=True), torch.nn.Linear(4, 3)

    def forward(self, inputs):
        steps = torch.full((len(inputs),), 3)
        packed = torch.nn.utils.rnn.pack_padded_sequence(inputs.unflatten(1, (3, 2)), steps, batch_first=True)
        return self.out(self.cell(packed)[1][0])


class Sorts(Mlp):
    def forward(self, inputs):
        return super().forward(inputs) + torch.unique(inputs).sum()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": Branches}, "control flow that depends on the data"),
        ({"model": Reads}, r"reads a number out of a tensor \(\.item\(\)\)"),
        ({"model": Draws}, "draws random numbers in another way than dropout"),
        ({"model": Packs}, "pack"),
        ({"model": Sorts}, "torch cannot run aten::_unique2 for many clients at once"),
        ({"optimizer": partial(torch.optim.LBFGS, lr=0.1)}, "LBFGS is not known to treat each number by itself"),
    ],
    ids=["branch", "item", "noise", "packed", "operation", "optimizer"],
)
def test_what_cannot_be_stacked_is_named(settings, reason):
    ours = learner(**settings)
    with pytest.raises(CannotStackError, match=reason):
        ours.stacked(samples(40))
    with pytest.raises(ConfigurationError, match=rf"cannot hold this learner: .*{reason}.*; use engine='auto'"):
        choose_engine("vectorized", ours, population([20, 20]))
    engine, line = choose_engine("auto", ours, population([20, 20]))
    assert engine.name == "sequential"
    assert line.startswith("engine sequential: ")


class Twice(Mlp):
    """Scales its output by a plain attribute that each pass changes."""

    def forward(self, inputs):
        self.scale = getattr(self, "scale", 1.0) * 1.5
        return super().forward(inputs) * self.scale


def test_a_model_that_would_end_elsewhere_is_found_by_trying():
    with pytest.raises(CannotStackError, match="as one program its gradient would differ"):
        learner(Twice).stacked(samples(40))


def test_groups_and_settings_of_the_users_optimizer_are_kept():
    def groups(params):
        params = list(params)
        decay, plain = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
        return torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.5, "lr": 0.02}, {"params": plain, "weight_decay": 0.0}], amsgrad=True
        )

    ours = learner(optimizer=groups, epochs=3)
    clients = population((8,) * 6)
    found = shoal.federate(ours, clients, rounds=2, engine="vectorized").params
    assert_equal(found, shoal.federate(ours, clients, rounds=2, engine="sequential").params, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    ["Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"],
)
def test_every_element_wise_optimizer_equals_the_reference(kind):
    ours = learner(
        lambda: Mlp().double(),
        transform=lambda inputs: inputs.double(),
        optimizer=partial(getattr(torch.optim, kind), lr=0.01),
        epochs=3,
    )
    clients = population((8, 9, 3, 12))
    found = shoal.federate(ours, clients, rounds=2, engine="vectorized").params
    assert_equal(found, shoal.federate(ours, clients, rounds=2, engine="sequential").params, atol=1e-9)


@pytest.mark.parametrize(("mean", "batch_size"), [(2, 10), (3, 32)])
def test_of_ten_thousand_lognormal_clients_every_sample_is_trained_on_once_and_little_is_padding(
    mean, batch_size, monkeypatch
):
    sizes = np.maximum(np.random.default_rng(0).lognormal(mean, 1, size=10_000).astype(int), 1)
    total = int(sizes.sum())
    ids = np.arange(total, dtype=np.float32)[:, None]
    clients = Population(
        ArrayDataset(ids, np.arange(total) % 2), np.arange(total), np.concatenate([[0], sizes.cumsum()])
    )
    seen, computed = np.zeros(total, dtype=int), 0
    load = BlockData.load

    def watched(*arguments):
        batches = load(*arguments)

        def cut(part):
            nonlocal computed
            inputs, targets, masks = batches(part)
            computed += inputs.shape[0] * inputs.shape[1]
            real = inputs if masks is None else inputs[masks > 0]
            np.add.at(seen, real.flatten().long().numpy(), 1)
            return inputs, targets, masks

        return cut

    ours = learner(lambda: nn.Linear(1, 2), transform=lambda inputs: inputs / total, batch_size=batch_size)
    engine = VectorizedEngine(block_size=50)
    engine.open(ours, clients)
    monkeypatch.setattr(BlockData, "load", watched)
    broadcast = Broadcast(round=1, model=ours.init(0))
    results = list(engine.run(ours, broadcast, tasks(clients, range(10_000))))
    assert sorted(client for result in results for client in result.clients) == list(range(10_000))
    assert sum(result.updates.weights.sum() for result in results) == total
    assert (seen == 1).all()
    assert 1 - total / computed < 0.15


def test_auto_leaves_unequal_clients_that_cannot_be_padded_to_the_sequential_engine():
    for model, sizes, name in (
        (BatchNormNet, [20, 20], "vectorized"),
        (BatchNormNet, [25, 15], "sequential"),
        (Mlp, [25, 15], "vectorized"),
    ):
        engine, line = choose_engine("auto", learner(model), population(sizes))
        assert engine.name == name
        assert line.startswith(f"engine {name}: ")


def test_what_did_not_fit_in_one_round_is_not_tried_in_the_next(monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "shoal")
    ours = learner()
    stacked = ours.stacked
    monkeypatch.setattr(type(ours), "stacked", lambda _, dataset: NeedsRoom(stacked(dataset), 5))
    shoal.federate(ours, population((8, 9) * 8), rounds=3, engine="vectorized")
    assert caplog.text.count("does not fit") == 2  # sixteen, and eight
