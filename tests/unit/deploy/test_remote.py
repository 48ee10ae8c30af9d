from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest

import shoal
from process_table import open_files
from shoal.data import Population
from shoal.deploy import remote, roster
from shoal.deploy.answer import Answer
from shoal.deploy.parcel import Parcel, array_of, raw
from shoal.deploy.remote import RemoteEngine, read_sites
from shoal.deploy.request import Request
from shoal.engine import ClientTask
from shoal.errors import ClientError, ConfigurationError, EngineError, SiteError, StorageError
from shoal.experiments.remote import Order, remotely
from shoal.federation.site_population import SitePopulation
from shoal.learners.script import ScriptLearner
from shoal.sites.policy import SitePolicy
from shoal.sites.state import Deadlines
from shoal.types import Broadcast

NAMES = ["site-1", "site-2"]

POPULATION: Population = SitePopulation([shoal.Site(name) for name in NAMES])


class Wire:
    """Each address is a site, which answers at once what a function says.

    Args:
        answer: Of a site's name and a request: fields of the answer, with ``arrays``; or an exception.
        names: The sites.
    """

    name = "test"

    def __init__(self, answer=lambda name, request: {}, names=NAMES):
        self.names = list(names)
        self.answer = answer
        self.heard = []
        self._waiting = []
        self._count = 0

    def present(self):
        return self.names

    def send(self, to, parcel):
        request = Request.from_json(json.loads(json.dumps(parcel.meta)))
        tickets = {}
        for address in to:
            self._count += 1
            tickets[address] = str(self._count)
            self.heard.append((address, request, parcel.tensors))
            said = self.answer(address, request)
            if isinstance(said, dict):
                arrays = {name: raw(array) for name, array in said.pop("arrays", {}).items()}
                told = Answer(site=address, **{"number": request.number, **said}).to_json()
                said = Parcel(meta=json.loads(json.dumps(told)), tensors=arrays)
            self._waiting.append((tickets[address], said))
        return tickets

    def receive(self, seconds):
        while self._waiting:
            yield self._waiting.pop(0)

    def forget(self, tickets):
        pass


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(roster, "CENSUS", 0.0)


@pytest.fixture
def learner(tmp_path):
    return ScriptLearner(tmp_path / "client.py", {"w": np.arange(4, dtype=np.float32)})


def engine(wire, names=NAMES, **policy):
    policy = SitePolicy(waits=Deadlines(start=0.5, reply=2, finish=1), **{"min_sites": 2, **policy})
    return RemoteEngine(
        wire=wire, experiment="any", settings={"lr": "1"}, digest="d", run_name="r1", names=names, policy=policy
    )


def trains(name, request):
    if request.kind != "train":
        return {}
    w = np.full(4, request.clients[name], np.float32)
    return {"examples": 3.0 + request.clients[name], "tree": "params", "arrays": {"w": w}, "seconds": 2.5}


def run(made, learner, round=1):
    model = learner.init(0)
    tasks = [ClientTask(client=k, data=POPULATION[k], seed=11, round=round) for k in range(2)]
    return list(made.run(learner, Broadcast(round=round, model=model), tasks))


def test_a_round_is_what_the_sites_reply(learner):
    wire = Wire(trains)
    made = engine(wire)
    made.rounds = 9
    made.open(learner, POPULATION)
    results = run(made, learner)
    assert [(each.client, each.error) for each in results] == [(0, None), (1, None)]
    for client, each in enumerate(results):
        assert each.update.weight == 3.0 + client
        np.testing.assert_array_equal(each.update.delta["w"], client - np.arange(4.0))
    assert made.seconds == {0: 2.5, 1: 2.5}
    _, request, tensors = wire.heard[-1]
    assert (request.kind, request.run, request.experiment) == ("train", "r1", "any")
    assert (request.settings, request.digest, request.clients) == ({"lr": "1"}, "d", {"site-1": 0, "site-2": 1})
    assert (request.seed, request.round, request.rounds, request.framework) == (11, 1, 9, "numpy")
    np.testing.assert_array_equal(array_of(tensors["params/w"], framework="numpy"), np.arange(4))
    numbers = [request.number for _, request, _ in wire.heard if request.clients]
    assert numbers == sorted(numbers)
    made.close()
    assert wire.heard[-1][1].kind == "end"


def test_an_early_end_is_told_before_this_process_goes_on_but_not_for_ever(learner, monkeypatch):
    """What Flower and NVFlare have not brought to a site, they drop when the server's process ends."""
    monkeypatch.setattr(remote, "PARTING", 0.3)

    class Slow(Wire):
        looks = 0

        def receive(self, seconds):
            if any(request.kind == "end" for _, request, _ in self.heard):
                self.looks += 1
                if self.looks < 4 or self.deaf:
                    time.sleep(0.01)
                    return
            yield from super().receive(seconds)

    for deaf in (False, True):
        wire = Slow(trains)
        wire.deaf = deaf
        made = engine(wire)
        made.open(learner, POPULATION)
        begun = time.monotonic()
        made.close()
        assert (wire.looks > 4) == deaf
        assert (time.monotonic() - begun >= 0.3) == deaf


def test_without_names_the_sites_are_those_that_come_in_order(learner):
    wire = Wire(trains, ["b-10", "b-9"])
    made = engine(wire, names=None)
    made.open(learner, POPULATION)
    assert wire.heard[-1][1].clients == {"b-9": 0, "b-10": 1}
    made.close()


def test_more_sites_than_clients_are_refused(learner):
    made = engine(Wire(trains, ["a", "b", "c"]), names=None)
    with pytest.raises(ConfigurationError, match="3 sites are there and the experiment has 2 clients, .* make it 3"):
        made.open(learner, POPULATION)
    made.close()


def test_sites_that_do_not_come_are_named(learner):
    made = engine(Wire(trains, ["site-2"]))
    with pytest.raises(SiteError, match="of 2 sites 1 did not come within 0.5 s: site-1; see to it that `shoal site`"):
        made.open(learner, POPULATION)
    made = engine(Wire(trains, ["a"]), names=None)
    with pytest.raises(SiteError, match=r"of 2 sites 1 did not come within 0.5 s \(a came\)"):
        made.open(learner, POPULATION)


def test_enough_sites_begin(learner, caplog):
    wire = Wire(trains, ["site-2"])
    made = engine(wire, min_sites=1)
    made.open(learner, POPULATION)
    results = run(made, learner)
    assert [(each.client, type(each.error)) for each in results] == [(1, type(None)), (0, ClientError)]
    wire.names = NAMES
    run(made, learner, round=2)  # in which the other one is seen to be there
    assert sorted(each.client for each in run(made, learner, round=3) if each.error is None) == [0, 1]
    made.close()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"examples": 0.0}, "it replied with 0 examples"),
        ({"examples": float("inf")}, "it replied with inf examples"),
        ({"examples": float("nan")}, "it replied with nan examples"),
        ({"examples": -1.0}, "it replied with -1 examples"),
        ({"examples": 1e308}, r"it replied with 1e\+308 examples"),
        ({"examples": 1e15}, r"it replied with 1e\+15 examples"),
        ({"arrays": {"__metadata__": np.zeros(4)}}, "site-2: no array may be called __metadata__"),
        ({"tree": ""}, "site-2: it sent no parameters"),
        ({"arrays": {}}, "site-2: it sent no w"),
        ({"arrays": {"w": np.zeros(3)}}, r"site-2: it sent w with shape \[3\], and \[4\] is expected"),
        ({"arrays": {"w": np.zeros(4, np.int64)}}, "site-2: it sent w as int64, and float32 is expected"),
        ({"arrays": {"w": np.full(4, np.nan)}}, "site-2: it sent NaN or infinity in w"),
        ({"arrays": {"w": np.zeros(4), "v": np.zeros(1)}}, "site-2: it sent v, which the model does not have"),
    ],
)
def test_a_reply_that_cannot_be_used_is_no_reply(learner, change, what):
    def answer(name, request):
        said = trains(name, request)
        return said | change if name == "site-2" and said else said

    made = engine(Wire(answer))
    made.open(learner, POPULATION)
    first, second = run(made, learner)
    assert first.error is None
    with pytest.raises((SiteError, ClientError), match=what):
        raise second.error
    made.close()


def test_a_full_disk_is_told(learner, monkeypatch):
    def full(parcel):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "spooled", full)
    made = engine(Wire(trains))
    made.open(learner, POPULATION)
    with pytest.raises(StorageError, match="the disk is full"):
        run(made, learner)
    made.close()


def test_files_are_closed_with_the_next_round_and_at_the_end(learner):
    before = len(open_files())

    def spools():
        return len(open_files()) - before

    made = engine(Wire(trains))
    made.open(learner, POPULATION)
    for number in (1, 2, 3):
        kept = run(made, learner, round=number)
        assert len(kept) == 2
        assert spools() == 2
    made.close()
    assert spools() == 0


def test_measures_of_the_sites_that_can(learner):
    def answer(name, request):
        if request.kind == "evaluate":
            return {"examples": 5.0, "metrics": {"accuracy": 0.5}}
        return {"evaluates": name == "site-2"}

    wire = Wire(answer)
    made = engine(wire)
    made.open(learner, POPULATION)
    assert made.measure(learner, learner.init(0), 1) == {1: (5.0, {"accuracy": 0.5})}
    made.close()


@pytest.mark.parametrize("examples", [0.0, -1.0, float("nan"), float("inf"), 1e15, 1e308])
def test_a_measure_of_no_number_of_examples_is_left_out(learner, caplog, examples):
    def answer(name, request):
        if request.kind == "evaluate":
            return {"examples": examples if name == "site-1" else 5.0, "metrics": {"accuracy": 0.5}}
        return {"evaluates": True}

    made = engine(Wire(answer))
    made.open(learner, POPULATION)
    assert made.measure(learner, learner.init(0), 3) == {1: (5.0, {"accuracy": 0.5})}
    assert f"site-1 is left out of round 3's evaluation: it replied with {examples:g} examples" in caplog.text
    made.close()


@pytest.mark.parametrize(
    "said",
    [
        {"error": "the script did not end"},
        {"error": "not here", "refused": True},
        EngineError("gone"),
        Parcel(meta={}),
    ],
    ids=["failed", "refused", "lost", "garbage"],
)
def test_what_goes_wrong_at_the_end_does_not_undo_the_run(learner, caplog, said):
    made = engine(Wire(lambda name, request: said if request.kind == "end" and name == "site-1" else {}))
    made.open(learner, POPULATION)
    made.finish()
    made.close()
    assert "after the last round" in caplog.text


def test_a_wire_that_is_gone_does_not_undo_the_run_either(learner, caplog):
    wire = Wire()
    made = engine(wire)
    made.open(learner, POPULATION)

    def gone(to, parcel):
        raise EngineError("the engine is gone")

    wire.send = gone
    made.finish()
    made.close()
    assert "the engine is gone" in caplog.text


def test_a_run_is_gone_on_with_at_its_own_sites_alone(learner, tmp_path):
    made = engine(Wire())
    made.open(learner, POPULATION)
    made.keep_logs(tmp_path / "sites")
    path = tmp_path / "sites" / "sites.json"
    assert read_sites(path) == {"run": "r1", "attempt": 0, "clients": {"site-1": 0, "site-2": 1}}
    made.close()
    other = engine(Wire(names=["site-1", "site-3"]), names=["site-1", "site-3"])
    other.open(learner, POPULATION)
    with pytest.raises(ConfigurationError, match="begun with the sites site-1, site-2, and site-1, site-3 are there"):
        other.keep_logs(tmp_path / "sites")
    other.close()
    for text in ("", "{}", "[]", '{"run": "r", "attempt": "x", "clients": {}}'):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match="does not say which sites the run has"):
            read_sites(path)


ORDER = Order(experiment="digits", name="digits", settings={"clients": "2"}, run_dir="/tmp/x", resume=True)


def test_an_order_is_json():
    assert Order.from_json(ORDER.to_json()) == ORDER
    told = json.loads(ORDER.to_json())
    for wrong in ("", "[]", "{}", "3", json.dumps({**told, "more": 1}), json.dumps({**told, "settings": 3})):
        with pytest.raises(ConfigurationError, match="that is no order for a server"):
            Order.from_json(wrong)


def test_an_experiment_with_an_engine_of_its_own_is_refused():
    from shoal.experiments.loading import build, load

    made = build(load("digits"), {"clients": "2"})
    order = replace(ORDER, resume=False)
    assert remotely(made, Wire(), order).engine.name == "test"
    with pytest.raises(ConfigurationError, match="the experiment says engine='process', .* leave the engine out"):
        remotely(replace(made, engine="process"), Wire(), order)
