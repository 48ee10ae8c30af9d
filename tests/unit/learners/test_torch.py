from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shoal import trees
from shoal.data import ArrayDataset, ItemDataset
from shoal.devices import Devices
from shoal.errors import ConfigurationError, DataError
from shoal.learners.torch import accuracy, scale_pixels
from shoal.types import Broadcast, LocalObjective, ModelState
from support import CLASSES, FEATURES, BatchNormNet, Mlp, assert_equal, batch_indices, differ, learner, samples


def fit(learner, data, *, seed=1, objective=None, model=None):
    broadcast = Broadcast(round=1, model=model or learner.init(0), objective=objective or LocalObjective())
    return learner.fit(broadcast, data, np.random.default_rng(seed))


def trained(learner, update):
    """Returns the parameters and buffers after a fit that started from ``learner.init(0)``."""
    start = learner.init(0)
    return trees.advance(start.params, update.delta) | trees.advance(start.buffers, update.buffers)


def plain_loop(make_module, make_optimizer, data, *, epochs=1, clip=None, extra=lambda module: 0.0):
    """Trains as anyone would by hand, over the batches that the learner draws; returns the parameters by name."""
    torch.manual_seed(0)
    module = make_module().train()
    optimizer = make_optimizer(module.parameters())
    rng = np.random.default_rng(1)
    torch.manual_seed(int(rng.integers(2**63)))
    for indices in batch_indices(len(data), batch_size=4, epochs=epochs, steps=None, rng=rng):
        inputs, targets = map(torch.as_tensor, data.take(indices))

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = F.cross_entropy(module(inputs), targets) + extra(module)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            return loss

        optimizer.step(closure)
    return module.state_dict()


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
LBFGS = partial(torch.optim.LBFGS, lr=0.5, max_iter=3)


@pytest.mark.parametrize(
    ("model", "optimizer"), [(Mlp, SGD), (Mlp, ADAMW), (Mlp, LBFGS), (BatchNormNet, SGD), (BatchNormNet, ADAMW)]
)
def test_fit_is_the_plain_loop_bit_for_bit(model, optimizer):
    data = samples(22)
    ours = learner(model, optimizer=optimizer, epochs=2)
    update = fit(ours, data)
    expected = plain_loop(model, optimizer, data, epochs=2)
    after = trained(ours, update)
    assert_equal(after, {name: expected[name] for name in after})
    assert update.weight == 22


def test_clipping_is_that_of_torch():
    data = samples(12)
    ours = learner(optimizer=SGD, clip_norm=0.05)
    assert_equal(trained(ours, fit(ours, data)), plain_loop(Mlp, SGD, data, clip=0.05))
    assert differ(trained(ours, fit(ours, data)), plain_loop(Mlp, SGD, data))


def test_the_local_objective_is_the_gradient_of_its_formula():
    data = samples(12)
    ours = learner(optimizer=SGD, clip_norm=1.0)
    start = ours.init(0)
    correction = {name: torch.full_like(p, 0.03) for name, p in start.params.items()}

    def terms(module):
        params = dict(module.named_parameters())
        linear = sum((correction[name] * p).sum() for name, p in params.items())
        distance = sum(((p - start.params[name]) ** 2).sum() for name, p in params.items())
        return linear + 0.7 / 2 * distance

    update = fit(ours, data, objective=LocalObjective(proximal=0.7, correction=correction))
    assert_equal(trained(ours, update), plain_loop(Mlp, SGD, data, clip=1.0, extra=terms), atol=1e-6)
    assert differ(trained(ours, update), plain_loop(Mlp, SGD, data, clip=1.0))


def test_the_objective_reaches_parameters_that_the_loss_does_not():
    class Unused(nn.Linear):
        def __init__(self):
            super().__init__(FEATURES, CLASSES)
            self.unused = nn.Parameter(torch.ones(2))

    ours = learner(Unused, lr=1.0, batch_size=None)
    correction = {name: torch.ones_like(p) for name, p in ours.init(0).params.items()}
    update = fit(ours, samples(8), objective=LocalObjective(correction=correction))
    assert update.delta["unused"].tolist() == [-1.0, -1.0]


def test_float_buffers_are_sent_and_integer_buffers_are_not():
    ours = learner(BatchNormNet)
    model = ours.init(0)
    update = fit(ours, samples(12))
    assert set(model.buffers) == set(update.buffers) == {"2.running_mean", "2.running_var"}
    assert set(model.constants) == {"2.num_batches_tracked"}
    assert update.buffers["2.running_mean"].abs().sum() > 0


def test_dropout_depends_on_the_generator_alone_and_leaves_the_global_one():
    ours = learner(BatchNormNet)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = fit(ours, samples(12), seed=1)
    torch.rand(3)
    second = fit(ours, samples(12), seed=1)
    assert_equal(first.delta, second.delta)
    assert differ(first.delta, fit(ours, samples(12), seed=2).delta)
    torch.set_rng_state(state)
    fit(ours, samples(12))
    assert torch.equal(torch.get_rng_state(), state)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(FEATURES, FEATURES, bias=False)
        self.decoder = nn.Linear(FEATURES, FEATURES, bias=False)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs):
        return self.head(self.decoder(self.encoder(inputs).tanh()))


def test_tied_weights_travel_once_and_load_under_both_names():
    ours = learner(Tied)
    model = ours.init(0)
    assert set(model.params) == {"encoder.weight", "head.weight", "head.bias"}
    moved = ModelState(params=trees.advance(model.params, fit(ours, samples(12)).delta))
    module = Tied()
    module.load_state_dict(dict(ours.state_dict(moved)), strict=True)
    assert torch.equal(module.decoder.weight, moved.params["encoder.weight"])
    assert module.decoder.weight is module.encoder.weight


def test_frozen_parameters_are_constants():
    def model():
        module = Mlp()
        module[0].requires_grad_(False)
        return module

    ours = learner(model)
    update = fit(ours, samples(12))
    assert set(ours.init(0).constants) == {"0.weight", "0.bias"}
    assert set(update.delta) == {"2.weight", "2.bias"}


class MixedDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.low = nn.Linear(FEATURES, 8, dtype=torch.bfloat16)
        self.high = nn.Linear(8, CLASSES, dtype=torch.float64)

    def forward(self, inputs):
        return self.high(self.low(inputs.bfloat16()).double())


def test_mixed_dtypes_keep_theirs_and_come_back_exactly():
    ours = learner(MixedDtypes)
    model = ours.init(0)
    update = fit(ours, samples(12))
    after = trees.advance(model.params, update.delta)
    assert {name: p.dtype for name, p in after.items()} == {name: p.dtype for name, p in model.params.items()}
    assert {d.dtype for d in update.delta.values()} == {torch.float64}
    assert torch.equal(after["low.weight"], ours.resident.params["low.weight"])


def test_nothing_of_one_client_is_left_for_the_next():
    class Counting(BatchNormNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1), persistent=False)

        def forward(self, inputs):
            self.seen += len(inputs)
            return super().forward(inputs) * (1 + self.seen)

    ours = learner(Counting, optimizer=SGD)
    alone = fit(ours, samples(9, seed=4))
    model = ours.init(0)
    fit(ours, samples(20, seed=5), model=model)
    after_another = fit(ours, samples(9, seed=4), model=model)
    assert_equal(alone.delta, after_another.delta)
    assert_equal(alone.buffers, after_another.buffers)


def test_a_module_is_copied_and_its_weights_are_the_start():
    module = Mlp()
    before = trees.copy(module.state_dict())
    ours = learner(module)
    assert_equal(dict(ours.init(0).params), before)
    assert_equal(dict(ours.init(1).params), before)
    fit(ours, samples(9))
    assert_equal(dict(module.state_dict()), before)


def test_a_factory_depends_on_the_seed_and_not_on_the_global_generator():
    torch.manual_seed(1)
    first = learner().init(0)
    torch.manual_seed(2)
    assert_equal(dict(first.params), dict(learner().init(0).params))
    assert differ(first.params, learner().init(1).params)


def test_a_broadcast_in_numpy_is_as_good_as_one_in_torch():
    ours = learner(optimizer=SGD)
    model = ours.init(0)
    arrays = ModelState(params={name: p.numpy() for name, p in model.params.items()})
    assert_equal(fit(ours, samples(9), model=arrays).delta, fit(ours, samples(9), model=model).delta)


def test_evaluate_is_the_mean_over_examples_whatever_the_batch():
    data = samples(23)
    ours = learner()
    model = ours.init(0)
    one_by_one = learner(eval_batch_size=1).evaluate(model, data)
    torch.manual_seed(0)
    module = Mlp().eval()
    inputs, targets = map(torch.as_tensor, data.take(np.arange(23)))
    output = module(inputs)
    expected = {"loss": F.cross_entropy(output, targets).item(), "accuracy": accuracy(output, targets).item()}
    assert ours.evaluate(model, data) == pytest.approx(expected, abs=1e-6)
    assert one_by_one == pytest.approx(expected, abs=1e-6)


def test_evaluation_draws_the_same_each_time_and_leaves_the_global_generator():
    class AlwaysNoisy(Mlp):
        def forward(self, inputs):
            return super().forward(inputs + torch.randn_like(inputs))

    ours = learner(AlwaysNoisy)
    model, state = ours.init(0), torch.get_rng_state()
    ours.check(samples(9))
    first = ours.evaluate(model, samples(9))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert ours.evaluate(model, samples(9)) == first


def test_what_a_module_caches_in_evaluation_can_be_trained_with():
    class Caching(Mlp):
        cache = None

        def forward(self, inputs):
            if self.cache is None:
                self.cache = torch.ones(FEATURES) * 2  # as rotary embeddings keep their tables
            return super().forward(inputs * self.cache)

    ours = learner(Caching)
    ours.check(samples(4))
    ours.evaluate(ours.resident.state(), samples(4))
    update = ours.fit(Broadcast(round=1, model=ours.resident.state()), samples(4), np.random.default_rng(0))
    assert trees.norm(update.delta) > 0


def test_a_loss_of_one_element_is_as_good_as_a_scalar():
    ours = learner(loss=lambda output, target: F.cross_entropy(output, target).reshape(1), train_metrics=True)
    assert_equal(fit(ours, samples(9)).delta, fit(learner(), samples(9)).delta)
    assert set(ours.evaluate(ours.init(0), samples(9))) == {"loss", "accuracy"}


def test_regression_has_no_accuracy_and_other_metrics_are_the_users():
    data = ArrayDataset(np.ones((5, FEATURES), np.float32), np.zeros((5, 2), np.float32))

    def largest(output, target):
        return (output - target).abs().max()

    plain = learner(partial(nn.Linear, FEATURES, 2), loss=F.mse_loss)
    assert set(plain.evaluate(plain.init(0), data)) == {"loss"}
    own = learner(partial(nn.Linear, FEATURES, 2), loss=F.mse_loss, metrics={"largest": largest}, train_metrics=True)
    assert set(own.evaluate(own.init(0), data)) == set(fit(own, data).metrics) == {"loss", "largest"}


def test_training_metrics_are_means_over_what_was_trained_on():
    ours = learner(lr=1e-12, train_metrics=True, batch_size=5)
    data = samples(12)
    measured = fit(ours, data).metrics
    assert measured == pytest.approx(ours.evaluate(ours.init(0), data), abs=1e-6)


def test_a_transform_runs_on_each_batch():
    pixels = np.random.default_rng(0).integers(256, size=(9, FEATURES), dtype=np.uint8)
    labels = np.arange(9) % CLASSES
    as_floats = ArrayDataset((pixels / np.float32(255)).astype(np.float32), labels)
    ours = learner(transform=scale_pixels)
    assert_equal(fit(ours, ArrayDataset(pixels, labels)).delta, fit(learner(), as_floats).delta)


def test_a_torch_dataset_trains_like_its_arrays():
    data = samples(9)
    pairs = torch.utils.data.TensorDataset(torch.as_tensor(data.inputs), torch.as_tensor(data.targets()))
    ours = learner(optimizer=SGD)
    assert_equal(fit(ours, ItemDataset(pairs)).delta, fit(ours, data).delta)


@pytest.mark.parametrize(("sizes", "expected"), [({"steps": 7}, 7), ({"epochs": 3}, 9), ({"batch_size": None}, 1)])
def test_steps_epochs_and_full_batches(sizes, expected):
    calls = []

    def loss(output, target):
        calls.append(len(target))
        return F.cross_entropy(output, target)

    fit(learner(loss=loss, **sizes), samples(10))
    assert len(calls) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"steps": 3, "epochs": 2}, "leave one out"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0"),
        ({"clip_norm": float("nan")}, "clip_norm must be > 0"),
        ({"devices": Devices("mirrored", count=2)}, "'mirrored' is TensorFlow's: with torch use 'ddp'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        learner(**settings)


def lazy():
    return nn.LazyLinear(CLASSES)


def complex_valued():
    return nn.Linear(FEATURES, CLASSES, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Identity, "nothing to train"),
        (complex_valued, "is complex"),
        (dict, "must be a torch.nn.Module"),
        pytest.param(lazy, "no shape yet", marks=pytest.mark.filterwarnings("ignore:Lazy modules")),
    ],
)
def test_models_that_cannot_be_trained_are_refused(model, message):
    with pytest.raises(ConfigurationError, match=message):
        learner(model).init(0)


def test_check_finds_labels_without_an_output_and_misfitting_shapes():
    inputs = np.zeros((6, FEATURES), np.float32)
    ours = learner()
    ours.check(samples(6))
    with pytest.raises(DataError, match="sample 4 has a label outside 0 to 2"):
        ours.check(ArrayDataset(inputs, np.array([0, 1, 2, 0, 3, 1])))
    with pytest.raises(DataError, match="sample 1 has a label outside"):
        ours.check(ArrayDataset(inputs, np.array([0, -1, 2, 0, 1, 1])))
    ours.check(ArrayDataset(inputs, np.array([0, -100, 2, 0, 1, 1])))  # what cross entropy leaves out
    with pytest.raises(DataError, match="do not take the data: RuntimeError"):
        ours.check(ArrayDataset(inputs[:, :2], np.zeros(6, np.int64)))
    with pytest.raises(DataError, match="must be one number"):
        learner(loss=partial(F.cross_entropy, reduction="none")).check(samples(6))


def test_no_example_is_refused():
    empty = ArrayDataset(np.zeros((0, FEATURES), np.float32), np.zeros(0, np.int64))
    ours = learner()
    for call in (lambda: fit(ours, empty), lambda: ours.evaluate(ours.init(0), empty)):
        with pytest.raises(DataError, match="no example"):
            call()


def test_descriptions_differ_where_the_numbers_would():
    def with_rate(lr):
        return learner(optimizer=lambda params: torch.optim.SGD(params, lr=lr)).describe()

    assert learner(lr=0.1).describe() == learner(lr=0.1).describe()
    assert learner(lr=0.1).describe() != learner(lr=0.2).describe()
    assert with_rate(0.1) == with_rate(0.1) != with_rate(0.2)
    assert learner(Mlp).describe() != learner(Tied).describe()
    assert learner(eval_batch_size=7).describe() == learner().describe()


@pytest.mark.parametrize(("asked", "seen"), [(1, 1), (3, 3), (None, 2)])
def test_threads_are_those_asked_for_and_the_users_come_back(asked, seen):
    before = torch.get_num_threads()
    threads = []

    def loss(output, target):
        threads.append(torch.get_num_threads())
        return F.cross_entropy(output, target)

    torch.set_num_threads(2)
    try:
        ours = learner(loss=loss, devices=Devices(threads=asked))
        fit(ours, samples(4))
        ours.evaluate(ours.init(0), samples(4))
        assert threads == [seen, seen]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
