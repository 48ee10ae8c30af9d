from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest

from shoal.algorithms import FedAvg, WeightedSum
from shoal.processes.tensors import TensorFile, write_tensors
from shoal.sites.state import Reply
from shoal.sites.task import SiteTask
from shoal.types import Broadcast, ModelState

PARAMS = {"w": np.arange(3, dtype=np.float32)}
BUFFERS = {"mean": np.ones(2, np.float32)}


@contextlib.contextmanager
def replied(tree, arrays):
    """Returns a task with the model above, and a reply to it."""
    model = ModelState(params=PARAMS, buffers=BUFFERS, constants={})
    work = SiteTask("train", Broadcast(round=1, model=model), ties={}, seed=0)
    with TensorFile(write_tensors(arrays)) as file:
        yield work, Reply(task=1, examples=1.0, metrics={}, tree=tree, file=file)


@pytest.mark.parametrize("tree", ["params", "delta"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"mean": np.zeros(1, np.float32)}, "it sent mean with shape [1], and [2] is expected"),
        ({"mean": np.zeros(9, np.float32)}, "it sent mean with shape [9], and [2] is expected"),
        ({"mean": np.zeros(2, np.int64)}, "it sent mean as int64, and float32 is expected"),
        ({"w": np.zeros(1, np.float32)}, "it sent w with shape [1], and [3] is expected"),
        ({"w": np.zeros(3, np.int32)}, "it sent w as int32, and float32 is expected"),
        ({"more": np.zeros(1)}, "it sent more, which the model does not have"),
        ({}, None),
    ],
)
def test_all_that_a_site_sends_must_fit_the_model(tree, change, what):
    with replied(tree, PARAMS | BUFFERS | change) as (work, reply):
        assert work.problem(reply) == what


def test_buffers_may_be_left_out_beside_what_has_changed():
    with replied("delta", PARAMS) as (work, reply):
        assert work.problem(reply) is None
        np.testing.assert_array_equal(work.update(reply).buffers["mean"], np.zeros(2))
    with replied("params", PARAMS) as (work, reply):
        assert work.problem(reply) == "it sent no mean"
    with replied("delta", BUFFERS) as (work, reply):
        assert work.problem(reply) == "it sent no w"


@pytest.mark.parametrize("tree", ["params", "delta"])
def test_a_round_of_sites_takes_one_new_model_and_little_more_at_the_server(tree):
    model = ModelState(params={"w": np.ones((1000, 1000), np.float32)})
    work = SiteTask("train", Broadcast(round=1, model=model), ties={}, seed=0)
    method, total = FedAvg(), WeightedSum(model)
    sent = {place: np.full((1000, 1000), place + 2, np.float32) for place in range(8)}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(TensorFile(write_tensors({"w": array}))) for array in sent.values()]
        tracemalloc.start()
        try:
            for place, file in enumerate(files):
                reply = Reply(task=1, examples=1.0, metrics={}, tree=tree, file=file)
                assert work.problem(reply) is None
                total.add_later(work.update(reply), 1.0 + place, place=place)
            after = method.step(method.start(model), total.mean()).model.params["w"]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 1.4 * after.nbytes  # one array in float64 would be two models more
    mean = sum((1 + place) * (place + 2) for place in range(8)) / sum(range(9))
    np.testing.assert_array_equal(after, np.float32(mean if tree == "params" else 1 + mean))
