from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from process_table import alive, children, eventually, open_files
from shoal.data import ArrayDataset, Population, Subset
from shoal.engines import ClientTask, DistributedEngine, ProcessEngine, SequentialEngine
from shoal.errors import ClientError, ConfigurationError, DataError, EngineError
from shoal.types import Broadcast, LocalObjective, ModelState, Update

FEATURES = 4


@dataclass(frozen=True)
class MeanLearner:
    """Moves a vector towards the mean of the client's inputs, in numpy; and does what a test says, given the client."""

    act: Callable[[int], Any] = lambda client: None
    devices: shoal.Devices = field(default_factory=shoal.Devices)
    load: Callable[[], None] = lambda: None

    def preload(self):
        self.load()

    def on(self, devices):
        return dataclasses.replace(self, devices=devices)

    def init(self, seed):
        return ModelState(params={"w": np.full(FEATURES, seed, np.float32)}, constants={"steps": np.int64(3)})

    def fit(self, broadcast, data, rng):
        started = time.monotonic()
        if len(data) == 0:
            raise DataError("there is no example to train on")
        inputs, _ = data.take(np.arange(len(data)))
        told = self.act(int(inputs[0, 0]))
        w = broadcast.model.params["w"].astype(np.float64)
        delta = 0.1 * (inputs.mean(axis=0) - w) + 1e-3 * rng.normal(size=FEATURES)
        if broadcast.objective.correction is not None:
            delta -= broadcast.objective.correction["w"]
        measured = {"pid": os.getpid(), "threads": self.devices.threads or 0, "started": started}
        return Update(
            delta={"w": delta},
            weight=float(len(data)),
            metrics={**measured, "ended": time.monotonic()},
            extras={"control/variate": {"w": delta * told} if isinstance(told, float) else {}, "none": {}},
        )

    def evaluate(self, model, data):
        return {"loss": 0.0}

    def check(self, data):
        pass

    def state_dict(self, model):
        return model.params

    def describe(self):
        return {"name": "MeanLearner"}


def clients(count: int = 5) -> Population:
    """Returns clients of several sizes, whose inputs begin with the client's number."""
    sizes = 2 + np.arange(count) % 3
    inputs = np.random.default_rng(0).normal(size=(sizes.sum(), FEATURES))
    inputs[:, 0] = np.repeat(np.arange(count), sizes)
    return Population(
        ArrayDataset(inputs, np.zeros(len(inputs), int)), np.arange(len(inputs)), np.cumsum([0, *sizes.tolist()])
    )


def tasks(population: Population, *, round: int = 1) -> list[ClientTask]:
    return [ClientTask(client=k, data=data, seed=0, round=round) for k, data in enumerate(population)]


@contextlib.contextmanager
def opened(act=lambda client: None, count=5, **settings):
    """An open engine, and what starts a round of all clients. Nothing of it is left behind."""
    before = open_files(), children(os.getpid()), sorted(Path("/dev/shm").iterdir())
    learner = act if isinstance(act, MeanLearner) else MeanLearner(act)
    population = clients(count)
    engine = ProcessEngine(**settings)
    engine.open(learner, population)

    def start(objective=None, round=1):
        broadcast = Broadcast(round=round, model=learner.init(1), objective=objective or LocalObjective())
        return engine.run(learner, broadcast, tasks(population, round=round))

    try:
        yield engine, start
    finally:
        engine.close()
        engine.close()
    assert (open_files(), children(os.getpid()), sorted(Path("/dev/shm").iterdir())) == before


def server(engine: ProcessEngine) -> int:
    return engine._link._pid


def errors(results):
    return {result.client: str(result.error) for result in results if result.error is not None}


def pids(results):
    return [int(result.update.metrics["pid"]) for result in results if result.update is not None]


@pytest.mark.parametrize("settings", [{}, {"max_concurrent": 1}, {"max_concurrent": 3, "clients_per_process": 2}])
@pytest.mark.parametrize("objective", [None, LocalObjective(correction={"w": np.full(FEATURES, 0.5)})])
def test_every_bit_is_the_sequential_engines(settings, objective):
    def act(client):
        return client / 7

    population = clients(11)
    broadcast = Broadcast(round=2, model=MeanLearner().init(1), objective=objective or LocalObjective())
    expected = list(SequentialEngine().run(MeanLearner(act), broadcast, tasks(population, round=2)))
    with opened(act, 11, **settings) as (engine, start):
        for _ in range(2):
            found = list(start(objective, round=2))
            assert children(server(engine)) == []  # gone when the round has ended
            assert [result.client for result in found] == list(range(11))
            for result, other in zip(found, expected, strict=True):
                update, own = result.update, other.update
                assert update.delta["w"].tobytes() == own.delta["w"].tobytes()
                assert update.weight == own.weight
                assert update.buffers == {}
                assert list(update.extras) == ["control/variate", "none"]
                assert update.extras["control/variate"]["w"].tobytes() == own.extras["control/variate"]["w"].tobytes()
                assert update.extras["none"] == {}
                assert list(update.metrics) == list(own.metrics)


def test_a_child_trains_as_many_clients_as_it_may_and_no_more_run_at_once_than_asked():
    with opened(lambda _: time.sleep(0.1), 12, max_concurrent=3, clients_per_process=2) as (engine, start):
        found = list(start())
        assert sorted(pids(found).count(pid) for pid in set(pids(found))) == [2] * 6
        assert not {os.getpid(), server(engine)} & set(pids(found))
        spans = [(result.update.metrics["started"], result.update.metrics["ended"]) for result in found]
        at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
        assert 1 < max(at_once) <= 3


def test_results_are_held_back_for_their_order_but_not_without_bound(tmp_path):
    def act(client):
        (tmp_path / str(client)).touch()
        if client == 0:
            time.sleep(0.5)

    with opened(act, 30, max_concurrent=2) as (_, start):
        results = start()
        assert next(results).client == 0
        assert eventually(lambda: len(list(tmp_path.iterdir())) == 4)  # children go on meanwhile
        time.sleep(0.2)
        assert len(list(tmp_path.iterdir())) == 4  # though not for ever
        assert [result.client for result in results] == list(range(1, 30))


def broken(client):
    if client == 2:
        raise ZeroDivisionError("the client's own fault")


def test_an_exception_comes_with_the_childs_traceback():
    with opened(broken) as (_, start):
        found = list(start())
    assert errors(found) == {2: "ZeroDivisionError: the client's own fault"}
    assert isinstance(found[2].error, ClientError)
    shown = "".join(traceback.format_exception(found[2].error))
    assert "In the process of client 2:" in shown
    assert f'{Path(__file__).name}", line' in shown
    assert "in broken" in shown


def hang():
    time.sleep(100)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda: os._exit(3), "client 2's process ended with exit code 3"),
        (lambda: os._exit(0), "client 2's process ended with exit code 0"),
        (lambda: sys.exit(4), "client 2's process ended with exit code 4"),
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "client 2's process was killed by SIGKILL (signal 9); the system may have run out of memory",
        ),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "client 2's process was killed by SIGTERM (signal 15)"),
        (
            hang,
            "client 2 took longer than client_timeout=1.5 s and its process was killed: raise client_timeout if it "
            "needs more",
        ),
        (lambda: [0] * 2**60, "MemoryError"),
        (lambda: os.closerange(3, 1000), "client 2's process ended with exit code 1"),
    ],
    ids=["3", "0", "sys.exit", "SIGKILL", "SIGTERM", "late", "memory", "files"],
)
@pytest.mark.parametrize("clients_per_process", [1, 4])
def test_what_ends_a_child_fails_its_client_alone(harm, message, clients_per_process):
    settings = {"max_concurrent": 2, "clients_per_process": clients_per_process}
    settings["client_timeout"] = 1.5 if harm is hang else 60
    with opened(lambda client: harm() if client == 2 else None, **settings) as (engine, start):
        found = list(start())
        assert errors(found) == {2: message}
        assert [result.client for result in found if result.update] == [0, 1, 3, 4]
        assert children(server(engine)) == []


def test_an_update_that_cannot_be_sent_is_its_clients_failure():
    class Odd(MeanLearner):
        def fit(self, broadcast, data, rng):
            update = super().fit(broadcast, data, rng)
            return update if len(data) > 2 else dataclasses.replace(update, delta={"w": np.array([object()])})

    with opened(Odd()) as (_, start):
        found = errors(start())
    assert found == dict.fromkeys(
        (0, 3), "TypeError: delta w: numpy arrays of object cannot be handed to another process"
    )


def test_processes_that_a_client_started_end_with_it():
    def act(client):
        if client == 1:
            return float(subprocess.Popen(["sleep", "100"]).pid)
        return None

    with opened(act, clients_per_process=5) as (_, start):
        found = list(start())
        started = int(found[1].update.extras["control/variate"]["w"][0] / found[1].update.delta["w"][0] + 0.5)
        assert started > 1
        assert eventually(lambda: not alive(started))


def test_what_a_child_prints_is_printed(capfd):
    with opened(lambda client: print(f"of client {client}")) as (_, start):
        list(start())
    assert sorted(capfd.readouterr().out.splitlines()) == [f"of client {client}" for client in range(5)]


def test_a_child_that_asks_for_input_gets_none():
    with opened(lambda client: 1 / len(os.read(0, 1))) as (_, start):
        assert set(errors(start()).values()) == {"ZeroDivisionError: division by zero"}


def test_a_round_that_is_abandoned_leaves_no_process_and_the_next_goes_on():
    with opened(lambda client: time.sleep(100 if client > 1 else 0), 9, max_concurrent=3) as (engine, start):
        results = start()
        next(results)
        running = children(server(engine))
        assert running
        results.close()
        assert children(server(engine)) == []
        assert not any(alive(pid) for pid in running)
        again = start()
        assert next(again).client == 0


def test_a_new_round_ends_the_one_before():
    with opened(lambda client: time.sleep(0.01)) as (_, start):
        first = start()
        next(first)
        assert [result.client for result in start()] == list(range(5))
        with pytest.raises(EngineError, match="was closed, or began another round"):
            list(first)


def test_closing_in_the_middle_of_a_round_ends_everything():
    with opened(lambda client: time.sleep(100 if client else 0)) as (engine, start):
        results = start()
        next(results)
        own = [server(engine), *children(server(engine))]
        engine.close()
        assert not any(alive(pid) for pid in own)
        with pytest.raises(EngineError, match="was closed, or began another round"):
            next(results)


@pytest.mark.parametrize("seed", range(4))
def test_children_killed_at_random_moments_fail_their_clients_and_nothing_else(seed):
    rng = random.Random(seed)
    settings = {"max_concurrent": 3, "clients_per_process": rng.choice([1, 3])}
    with opened(lambda client: time.sleep(0.004), 40, **settings) as (engine, start):
        over = threading.Event()

        def kill():
            while not over.wait(rng.uniform(0, 0.05)):
                for pid in children(server(engine))[:1]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            found = list(start())
        finally:
            over.set()
            killer.join(10)
        assert [result.client for result in found] == list(range(40))
        assert all("was killed by SIGKILL" in error for error in errors(found).values())
        assert errors(start()) == {}


@pytest.mark.parametrize("seed", range(4))
def test_a_server_killed_at_a_random_moment_ends_the_round_and_can_be_opened_again(seed):
    rng = random.Random(seed)
    with opened(lambda client: time.sleep(0.01), 200, max_concurrent=2) as (engine, start):
        results = start()
        found = list(itertools.islice(results, rng.randrange(4)))
        pid = server(engine)
        running = children(pid)
        threading.Timer(rng.uniform(0, 0.1), os.kill, (pid, signal.SIGKILL)).start()
        asked = time.monotonic()
        with pytest.raises(EngineError, match=r"was killed by SIGKILL .*: open the engine again"):
            found += results
        assert time.monotonic() - asked < 5
        assert len(found) < 200
        assert eventually(lambda: not any(alive(child) for child in [*running, *children(pid)]))
        with pytest.raises(EngineError, match="open the engine again"):
            list(start())
        engine.open(engine._learner, clients(200))
        assert server(engine) in children(os.getpid())
        assert pid not in children(os.getpid())


def test_a_server_that_does_nothing_is_killed(monkeypatch):
    monkeypatch.setattr("shoal.engines.process.GRACE", 0.5)
    with opened(lambda client: time.sleep(100 if client else 0), client_timeout=1) as (engine, start):
        results = start()
        next(results)
        os.kill(server(engine), signal.SIGSTOP)
        with pytest.raises(EngineError, match=r"gave no answer within 1\.5 s and was killed"):
            list(results)


def test_a_server_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr("shoal.engines.server_link.PATIENCE", 0.2)
    with opened() as (engine, _):
        pid = server(engine)
        os.kill(pid, signal.SIGSTOP)
    assert not alive(pid)


def test_interrupts_and_terminations_are_the_parents_to_handle():
    with opened(lambda client: time.sleep(0.05)) as (engine, start):
        results = start()
        next(results)
        for pid in [server(engine), *children(server(engine))]:
            with contextlib.suppress(ProcessLookupError):  # it was done before
                os.kill(pid, signal.SIGINT)
        os.kill(server(engine), signal.SIGTERM)
        assert errors(results) == {}


def failing(message):
    def load():
        raise message

    return MeanLearner(load=load)


def test_a_learner_that_cannot_be_loaded_is_refused_at_once():
    before = children(os.getpid()), open_files()
    for error, message in (
        (ConfigurationError("use another"), "engine 'process' cannot run here: use another"),
        (ImportError("no such module"), "engine 'process' cannot run here: ImportError: no such module"),
        (ValueError("é" * 10_000), "é" * 100),
    ):
        with pytest.raises(ConfigurationError, match=message):
            ProcessEngine().open(failing(error), clients())
    with pytest.raises(EngineError, match="ended with exit code 5"):
        ProcessEngine().open(MeanLearner(load=lambda: os._exit(5)), clients())
    assert (children(os.getpid()), open_files()) == before


def test_a_learner_that_loads_for_ever_is_given_up(monkeypatch):
    monkeypatch.setattr("shoal.engines.process.START", 0.3)
    before = children(os.getpid())
    with pytest.raises(EngineError, match=r"gave no answer within 0\.3 s and was killed"):
        ProcessEngine().open(MeanLearner(load=hang), clients())
    assert children(os.getpid()) == before


def test_ctrl_c_while_it_loads_ends_the_server_at_once_and_without_a_word(capfd):
    before = children(os.getpid()), open_files()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    asked = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ProcessEngine().open(MeanLearner(load=hang), clients())
    assert time.monotonic() - asked < 3
    assert (children(os.getpid()), open_files()) == before
    assert capfd.readouterr() == ("", "")


def test_threads_are_shared_among_the_children_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for devices, concurrent, threads in (
        (shoal.Devices(), None, 1),
        (shoal.Devices(), 3, 2),
        (shoal.Devices(), 20, 1),
        (shoal.Devices(threads=5), 3, 5),
    ):
        with opened(MeanLearner(devices=devices), 1, max_concurrent=concurrent) as (_, start):
            assert next(start()).update.metrics["threads"] == threads
    launcher = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in launcher.items():  # of a launcher that has started four of this process
        monkeypatch.setenv(name, str(value))
    with opened(MeanLearner(), 6) as (_, start):
        results = start()
        assert next(results).update.metrics["threads"] == 1
    assert ProcessEngine(max_concurrent=1).child_threads(shoal.Devices()) == 2


def test_what_was_not_opened_is_refused():
    population, learner = clients(), MeanLearner()
    broadcast = Broadcast(round=1, model=learner.init(0))
    engine = ProcessEngine()
    with pytest.raises(ConfigurationError, match="is not open"):
        engine.run(learner, broadcast, tasks(population))
    engine.open(learner, population)
    with contextlib.closing(engine):
        with pytest.raises(ConfigurationError, match="another learner"):
            engine.run(MeanLearner(), broadcast, tasks(population))
        for data in (clients()[1], ArrayDataset(np.zeros((3, FEATURES)), np.zeros(3)), population.dataset):
            with pytest.raises(
                ConfigurationError, match=r"client 7 has other data: make them a Subset of that data set"
            ):
                engine.run(learner, broadcast, [ClientTask(client=7, data=data, seed=0, round=1)])


def test_workers_may_train_their_shares_in_processes():
    population = clients()
    inner = ProcessEngine(max_concurrent=2)
    found = shoal.federate(MeanLearner(), population, rounds=2, engine=DistributedEngine(inner))
    expected = shoal.federate(MeanLearner(), population, rounds=2, engine="sequential")
    assert found.params["w"].tobytes() == expected.params["w"].tobytes()


def test_a_population_over_a_part_of_a_data_set():
    whole = clients().dataset
    part = Population(Subset(whole, np.arange(3, 9)[::-1]), np.arange(6), np.array([0, 2, 6]))
    learner = MeanLearner()
    broadcast = Broadcast(round=1, model=learner.init(0))
    engine = ProcessEngine()
    engine.open(learner, part)
    with contextlib.closing(engine):
        found = list(engine.run(learner, broadcast, tasks(part)))
    for result, expected in zip(found, SequentialEngine().run(learner, broadcast, tasks(part)), strict=True):
        assert result.update.delta["w"].tobytes() == expected.update.delta["w"].tobytes()


def test_no_tasks_and_no_samples():
    learner, population = MeanLearner(), clients()
    broadcast = Broadcast(round=1, model=learner.init(0))
    engine = ProcessEngine()
    engine.open(learner, population)
    with contextlib.closing(engine):
        assert list(engine.run(learner, broadcast, [])) == []
        empty = ClientTask(client=0, data=Subset(population.dataset, np.arange(0)), seed=0, round=1)
        assert errors(engine.run(learner, broadcast, [empty])) == {0: "DataError: there is no example to train on"}


def test_a_machine_that_has_no_process_or_no_memory_left_says_so(monkeypatch):
    before = open_files()
    full = OSError(12, "Cannot allocate memory")

    def fail(*_):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", fail)
        with pytest.raises(EngineError, match=r"fork server of engine 'process' cannot be started: .* allocate memory"):
            ProcessEngine().open(MeanLearner(), clients())
    assert open_files() == before
    with opened() as (_, start):
        with monkeypatch.context() as patch:
            patch.setattr("shoal.engines.shared_trees.anonymous_file", fail)
            with pytest.raises(EngineError, match=r"no memory to share with its children: .* allocate memory"):
                list(start())
        assert errors(start()) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_concurrent": 0}, "max_concurrent must be at least 1, not 0; None is one for each core"),
        ({"clients_per_process": 0}, "clients_per_process must be at least 1, not 0"),
        ({"client_timeout": 0}, "client_timeout must be > 0 seconds, not 0"),
        ({"client_timeout": float("nan")}, "client_timeout must be > 0 seconds, not nan"),
    ],
)
def test_numbers_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ProcessEngine(**settings)


def test_where_no_process_can_be_started_clients_wait_for_one_or_fail():
    """The first child can be forked; while it lives the second waits; then nothing can be forked."""
    real = os.fork

    def load():
        forks = iter([True, False])

        def fork():
            if next(forks, False):
                return real()
            raise BlockingIOError(11, "Resource temporarily unavailable")

        os.fork = fork  # in the server alone

    with opened(MeanLearner(load=load), max_concurrent=2, clients_per_process=3) as (_, start):
        found = errors(start())
    assert os.fork is real
    told = "[Errno 11] Resource temporarily unavailable"
    assert found == {k: f"no process can be started for client {k}: {told}" for k in (3, 4)}
