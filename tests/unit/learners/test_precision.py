"""Steps in 16 bits: against plain torch with autocast."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import shoal
from models import MODELS, images
from shoal.devices import Devices
from shoal.errors import CannotStackError, ConfigurationError
from shoal.types import Broadcast
from support import Mlp, assert_equal, batch_indices, differ, learner, samples


def trained(precision, **settings):
    ours = learner(devices=Devices(precision=precision), **settings)
    data, start = samples(30), ours.init(0)
    rng = shoal.randomness.generator(0, "fit")
    return ours, data, start, ours.fit(Broadcast(round=0, model=start), data, rng)


def by_hand(ours, data, start, scaler=None):
    """The same steps in plain torch."""
    dtype = torch.bfloat16 if scaler is None else torch.float16
    model = Mlp()
    model.load_state_dict(start.params)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rng = shoal.randomness.generator(0, "fit")
    rng.integers(2**63)
    for indices in batch_indices(len(data), rng=rng, batch_size=4, epochs=1, steps=None):
        inputs, targets = (torch.as_tensor(array) for array in data.take(indices))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(inputs), targets)
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return {name: p.detach().double() - start.params[name] for name, p in model.named_parameters()}


def test_bf16_equals_autocast():
    ours, data, start, update = trained("bf16")
    assert_equal(update.delta, by_hand(ours, data, start))
    assert differ(update.delta, trained("fp32")[3].delta)
    assert all(array.dtype == torch.float64 for array in update.delta.values())
    assert all(array.dtype == torch.float32 for array in start.params.values())


def test_fp16_scales_the_loss_as_torch_does():
    ours, data, start, update = trained("fp16")
    assert_equal(update.delta, by_hand(ours, data, start, torch.amp.GradScaler("cpu", init_scale=2.0**12)))


def test_fp16_leaves_out_a_step_that_overflows():
    """The loss is so large that its scaled gradient is infinite in half precision, until the scale has come down."""
    huge = learner(loss=lambda o, t: 1e3 * F.cross_entropy(o, t), lr=1e-4, devices=Devices(precision="fp16"), steps=12)
    start = huge.init(0)
    update = huge.fit(Broadcast(round=0, model=start), samples(30), shoal.randomness.generator(0, "fit"))
    assert all(torch.isfinite(array).all() for array in update.delta.values())
    assert any(array.any() for array in update.delta.values())


def test_the_measured_loss_is_of_the_same_precision():
    low, high = (learner(devices=Devices(precision=precision)) for precision in ("bf16", "fp32"))
    data = samples(30)
    found, expected = low.evaluate(low.init(0), data), high.evaluate(high.init(0), data)
    assert found["loss"] != expected["loss"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)


@pytest.mark.parametrize("model", ["logistic", "cnn", "group_norm", "transformer"])
def test_stacked_clients_are_computed_in_16_bits_too(model):
    """Up to the rounding of 16 bits, and not as in 32 bits."""

    def ended(precision, engine):
        ours = shoal.TorchLearner(
            MODELS[model],
            loss=F.cross_entropy,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            batch_size=4,
            devices=Devices(precision=precision),
        )
        return shoal.federate(ours, images((9, 13, 6, 2, 10)), rounds=2, engine=engine).params

    low, high = ended("bf16", "vectorized"), ended("fp32", "vectorized")
    assert differ(low, high)
    assert_equal(low, ended("bf16", "sequential"), atol=1e-2)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigurationError, match="unknown precision 'fp8'; did you mean 'fp"):
        Devices(precision="fp8")
    lbfgs = learner(optimizer=partial(torch.optim.LBFGS, lr=0.1), devices=Devices(precision="fp16"))
    with pytest.raises(ConfigurationError, match="closure does not allow: use bf16"):
        lbfgs.fit(Broadcast(round=0, model=lbfgs.init(0)), samples(8), shoal.randomness.generator(0, "fit"))
    with pytest.raises(CannotStackError, match="fp16 leaves out the steps whose gradient overflows"):
        learner(devices=Devices(precision="fp16")).stacked(samples(30))


def test_the_precision_is_part_of_what_decides_the_numbers():
    assert learner(devices=Devices(precision="bf16")).describe() != learner().describe()
    assert learner(devices=Devices(threads=1)).describe() == learner().describe()
