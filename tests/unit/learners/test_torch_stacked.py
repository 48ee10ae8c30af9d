"""One block against its clients one by one; the contract suite does the same for whole federations."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shoal
from models import SHAPE, cnn, group_norm
from shoal.data import ArrayDataset, Population
from shoal.errors import CannotStackError
from shoal.learners.torch import accuracy
from shoal.learners.torch_memory import Pool
from shoal.learners.torch_model import BorrowedModule
from shoal.learners.torch_per_client import CONVOLUTIONS, PerClient
from shoal.learners.torch_stackable import find_stacking
from shoal.randomness import generator
from shoal.types import Broadcast
from support import BatchNormNet, Mlp, assert_equal, learner, population, samples

CLIENTS, BATCH = 4, 3
FORMATS = (torch.contiguous_format, torch.preserve_format)


class Sequence(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.layer = kind(6, 8, **settings)

    def forward(self, inputs):
        outputs, state = self.layer(inputs)
        return outputs.sum(-1) + (state[0] if isinstance(state, tuple) else state).sum()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, inputs):
        return self.again(torch.tanh(self.first(inputs)))


class Shared(nn.Module):
    """A frozen convolution and linear layer, and a bias for each client."""

    def __init__(self):
        super().__init__()
        self.base = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.head = nn.Linear(4 * 36, 5)
        self.head.weight.requires_grad_(False)

    def forward(self, inputs):
        return self.head(self.base(inputs).flatten(1))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (6,)),
    "linear on three axes": (lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 2)), (5, 6)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=4, bias=False, padding="same"),
            nn.GroupNorm(2, 8),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 4, (1, 2), dilation=2, padding=(0, 2)),
            nn.MaxPool2d(2, stride=1, ceil_mode=True),
        ),
        (3, 16, 16),
    ),
    "frozen": (Shared, SHAPE),
    "tied": (Tied, (6,)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 8), nn.Dropout(0.5)), (6,)),
    "norms": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.GroupNorm(2, 8)), (6,)),
    "embedding": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Softmax(-1)), (6,)),
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), (5, 16)),
    "transformer, time first": (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1), (5, 16)),
    "transformer, dropout": (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True), (5, 16)),
    "lstm": (partial(Sequence, nn.LSTM, batch_first=True), (5, 6)),
    "lstm, deep": (partial(Sequence, nn.LSTM, num_layers=2, bidirectional=True, bias=False), (5, 6)),
    "lstm, projected": (partial(Sequence, nn.LSTM, num_layers=2, proj_size=3), (5, 6)),
    "gru": (partial(Sequence, nn.GRU, num_layers=2, dropout=0.4), (5, 6)),
    "rnn": (partial(Sequence, nn.RNN, nonlinearity="relu"), (5, 6)),
    "rnn, tanh": (partial(Sequence, nn.RNN, bidirectional=True), (5, 6)),
}


def together(module, params, buffers, inputs, convolution, noise_format):
    generators = [torch.Generator().manual_seed(client) for client in range(CLIENTS)]
    borrowed = BorrowedModule(module)

    def one(arrays, own, x):
        return borrowed.call({**arrays, **own}, x)

    layers = PerClient(convolution, Pool(torch.device("cpu")), noise_format)
    layers.generators = generators
    with layers:
        outputs = torch.vmap(one, randomness="error")(params, buffers, inputs)
    (outputs**2).sum().backward()
    return outputs.detach()


def alone(module, params, buffers, inputs, client):
    own = {name: stacked.detach()[client].clone().requires_grad_() for name, stacked in params.items()}
    kept = {name: stacked[client].clone() for name, stacked in buffers.items()}
    torch.manual_seed(client)
    output = torch.func.functional_call(module, {**own, **kept}, (inputs[client],))
    (output**2).sum().backward()
    return output.detach(), {name: array.grad for name, array in own.items()}, kept


def agrees(layer, convolution, noise_format):
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    module = make().double()
    free = {name: p for name, p in module.named_parameters() if p.requires_grad}
    params = {name: torch.stack([0.3 * torch.randn_like(p) for _ in range(CLIENTS)]) for name, p in free.items()}
    params = {name: stacked.requires_grad_() for name, stacked in params.items()}
    buffers = {name: torch.stack([b] * CLIENTS) for name, b in module.named_buffers()}
    before = {name: stacked.clone() for name, stacked in buffers.items()}
    inputs = torch.randn(CLIENTS, BATCH, *shape, dtype=torch.float64)
    outputs = together(module, params, buffers, inputs, convolution, noise_format)
    for client in range(CLIENTS):
        output, gradients, changed = alone(module, params, before, inputs, client)
        same = torch.allclose(output, outputs[client], atol=1e-10)
        same &= all(torch.allclose(g, params[name].grad[client], atol=1e-9) for name, g in gradients.items())
        same &= all(torch.allclose(b, buffers[name][client], atol=1e-10) for name, b in changed.items())
        if not same:
            return False
    return True


@pytest.mark.parametrize(
    ("layer", "convolution"),
    [*((layer, "grouped") for layer in LAYERS), ("convolutions", "matmul"), ("frozen", "matmul")],
)
def test_a_layer_gives_each_client_what_it_gives_alone(layer, convolution):
    # Which order of memory the noise has alone is found by trying; one of them must be it.
    assert any(agrees(layer, convolution, noise_format) for noise_format in FORMATS)


def precision(output, target):
    """The share of what is taken for the first class that is of it."""
    found = output.argmax(dim=1) == 0
    return ((target == 0) & found).double().sum() / found.sum().clamp(min=1)


def by_hand(output, target):
    return (output.argmax(dim=1)[:2] == target[:2]).double().sum() / 2


@pytest.mark.parametrize(
    ("settings", "pads"),
    [
        ({}, True),
        ({"model": BatchNormNet}, False),
        ({"model": lambda: nn.Sequential(Mlp(), nn.Dropout(0.5))}, False),
        ({"train_metrics": True}, True),
        ({"train_metrics": True, "metrics": {"precision": precision}}, False),
        ({"metrics": {"precision": precision}}, True),
        ({"train_metrics": True, "metrics": {"first two": by_hand}}, False),
        ({"loss": lambda o, t: F.cross_entropy(o, t, weight=torch.tensor([1.0, 2.0, 5.0]))}, False),
        ({"loss": lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1)}, True),
        ({"loss": lambda o, t: F.cross_entropy(o, t).exp()}, False),
        ({"loss": lambda o, t: ((o - F.one_hot(t, 3)) ** 2).mean()}, True),
    ],
    ids=[
        "plain",
        "batch norm",
        "dropout",
        "accuracy",
        "precision",
        "not in training",
        "two",
        "weighted",
        "smoothed",
        "not a mean",
        "squares",
    ],
)
def test_only_a_plain_mean_over_separate_samples_is_padded(settings, pads):
    assert find_stacking(learner(**settings), samples(60)).pads is pads


def test_metrics_of_padded_clients_are_those_of_each_alone():
    clients = population((7, 12, 5, 9, 20))
    ours = learner(
        train_metrics=True, metrics={"accuracy": accuracy, "error": lambda o, t: 1 - accuracy(o, t)}, epochs=2
    )
    broadcast = Broadcast(round=1, model=ours.init(0))
    found = ours.stacked(clients.dataset).fit(
        broadcast, [(clients[k], generator(0, "fit", client=k)) for k in range(5)]
    )
    for k in range(5):
        expected = ours.fit(broadcast, clients[k], generator(0, "fit", client=k))
        assert {n: float(v) for n, v in found.row(k).metrics.items()} == pytest.approx(dict(expected.metrics), rel=1e-6)


def test_a_loss_of_one_element_is_stacked_like_a_scalar():
    ours = learner(loss=lambda output, target: F.cross_entropy(output, target).reshape(1))
    found, expected = (shoal.federate(made, population(), rounds=2, engine="vectorized") for made in (ours, learner()))
    assert_equal(found.params, expected.params, atol=1e-6)
    assert [r["train_loss"] for r in found.history] == pytest.approx([r["train_loss"] for r in expected.history])


@pytest.mark.parametrize(("room", "repeatable"), [(1e9, True), (15_000, False)])
def test_the_trial_takes_no_more_memory_than_there_is(room, repeatable, monkeypatch):
    monkeypatch.setattr("shoal.learners.torch_stackable.free_memory", lambda _: room)
    assert find_stacking(learner(), samples(60)).repeatable is repeatable


def test_a_model_of_which_there_is_no_room_for_two_is_not_stacked(monkeypatch):
    monkeypatch.setattr("shoal.learners.torch_stackable.free_memory", lambda _: 2000)
    with pytest.raises(CannotStackError, match="not enough free memory for two clients"):
        find_stacking(learner(), samples(60))


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("model", [cnn, group_norm])
def test_each_way_of_convolving_ends_where_one_client_does(model, convolution):
    rng = np.random.default_rng(0)
    data = ArrayDataset(rng.integers(256, size=(40, *SHAPE), dtype=np.uint8), rng.integers(4, size=40))
    clients = Population(data, np.arange(40), np.array([0, 9, 22, 28, 40]))
    ours = learner(model, transform=shoal.learners.torch.scale_pixels, epochs=2)
    broadcast = Broadcast(round=1, model=ours.init(0))
    pairs = [(clients[k], generator(0, "fit", client=k)) for k in range(4)]
    update = ours.stacked(data).fit(broadcast, pairs, convolution)
    for k in range(4):
        expected = ours.fit(broadcast, clients[k], generator(0, "fit", client=k))
        assert_equal({n: d[k].double() for n, d in update.delta.items()}, expected.delta, atol=1e-6)


def test_a_data_set_read_item_by_item_gives_the_same_as_arrays():
    arrays, clients = samples(53), population()
    items = list(zip(arrays.inputs, arrays.targets(), strict=True))
    ours = learner(epochs=2)
    listed = Population.from_datasets([[items[i] for i in clients[k].indices] for k in range(len(clients))])
    found = shoal.federate(ours, listed, rounds=3, engine="vectorized").params
    assert_equal(found, shoal.federate(ours, clients, rounds=3, engine="vectorized").params, atol=1e-7)


FROZEN = """
import resource, sys
from functools import partial
import numpy as np, torch, shoal
from torch import nn
from torch.nn import functional as F
from shoal.randomness import generator
from shoal.types import Broadcast

class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 2048, dropout=0.0, batch_first=True), 6)
        self.base.requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 256))
        self.out = nn.Linear(256, 4)
    def forward(self, x):
        hidden = self.base(x)
        return self.out((hidden + self.adapter(hidden)).mean(1))

torch.set_num_threads(1)
clients = int(sys.argv[1])
data = shoal.data.ArrayDataset(np.random.default_rng(0).normal(size=(64, 2, 256)).astype(np.float32), np.arange(64) % 4)
learner = shoal.TorchLearner(Adapted, loss=F.cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), batch_size=1)
model = learner.init(0)
base = sum(a.nbytes for a in model.constants.values())
own = sum(a.nbytes for a in model.params.values())
assert own < 0.05 * base
trainer = learner.stacked(data)
parts = [(shoal.data.dataset.Subset(data, np.arange(1)), generator(0, "fit", client=k)) for k in range(clients)]
trainer.fit(Broadcast(round=1, model=model), parts[:2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
trainer.fit(Broadcast(round=1, model=model), parts)
print(base, own, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
def test_a_frozen_base_is_one_copy_for_all_clients():
    done = subprocess.run([sys.executable, "-c", FROZEN, "40"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    base, own, more = map(int, done.stdout.split())
    # Forty clients need their adapters, the gradients, and small activations: not one more copy of the base.
    assert more < 40 * 4 * own + base, (base, own, more)
