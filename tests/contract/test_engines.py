"""What every engine must do. An engine joins by its name in ``ENGINES``."""

from __future__ import annotations

import numpy as np
import pytest

import shoal
from shoal.engines import ENGINES, ClientTask, SequentialEngine, choose_engine
from shoal.errors import ConfigurationError
from shoal.randomness import generator
from shoal.types import Broadcast, LocalObjective
from support import BatchNormNet, Failing, Mlp, assert_equal, learner, population

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def tasks(clients, cohort):
    return [ClientTask(client=k, data=clients[k], rng=generator(0, "fit", round=1, client=k)) for k in cohort]


def run(engine, learner, cohort=(0, 1, 2, 3, 4), objective=None):
    broadcast = Broadcast(round=1, model=learner.init(0), objective=objective or LocalObjective())
    results = ENGINES[engine]().run(learner, broadcast, tasks(population(), cohort))
    return {result.client: result for result in results}


@pytest.mark.parametrize("model", [Mlp, BatchNormNet])
@pytest.mark.parametrize("objective", [LocalObjective(), LocalObjective(proximal=0.5)])
def test_every_client_equals_the_reference(engine, model, objective):
    ours = learner(model)
    found = run(engine, ours, objective=objective)
    broadcast = Broadcast(round=1, model=ours.init(0), objective=objective)
    for expected in SequentialEngine().run(ours, broadcast, tasks(population(), range(5))):
        assert_equal(found[expected.client].update.delta, expected.update.delta, atol=1e-6)
        assert found[expected.client].update.weight == expected.update.weight


def test_a_clients_update_does_not_depend_on_the_others(engine):
    ours = learner(BatchNormNet)
    together = run(engine, ours)
    backwards = run(engine, ours, cohort=(4, 3, 2, 1, 0))
    alone = run(engine, ours, cohort=(3,))
    for other in (backwards, alone):
        assert_equal(together[3].update.delta, other[3].update.delta, atol=1e-6)
        assert_equal(together[3].update.buffers, other[3].update.buffers, atol=1e-6)


def test_an_exception_is_its_clients_result_and_the_others_go_on(engine):
    marked = population()[2].take(np.arange(1))[0][0, 0]

    def act(inputs):
        if (inputs[:, 0] == float(marked)).any():
            raise RuntimeError("the third client's own fault")

    found = run(engine, learner(lambda: Failing(act)))
    assert {client for client, result in found.items() if result.error} == {2}
    assert isinstance(found[2].error, RuntimeError)
    assert found[2].error.__traceback__ is not None
    assert all(found[client].update is not None for client in (0, 1, 3, 4))


def test_a_federation_on_it_equals_one_on_the_reference(engine):
    def params(name):
        return shoal.federate(learner(BatchNormNet), population(), rounds=3, cohort=3, engine=name).params

    assert_equal(params(engine), params("sequential"), atol=1e-5)


def test_it_is_found_by_its_name_and_auto_says_which_and_why(engine):
    assert choose_engine(engine)[0].name == engine
    chosen, line = choose_engine("auto")
    assert chosen.name in line
    with pytest.raises(ConfigurationError, match=f"unknown engine '{engine[:-1]}'; did you mean"):
        choose_engine(engine[:-1])
