"""Flower's messages as a wire, over a Grid that is a fake."""

import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shoal.deploy.parcel import Parcel, RawTensor, raw
from shoal.errors import EngineError

pytest.importorskip("flwr")

from flwr.app import Error, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from shoal.deploy.flower_records import parcel_of, records_of
from shoal.deploy.flower_wire import FlowerWire


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says who sends, as the process of a ServerApp does."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def travelled(message: Message) -> Message:
    """Returns a message as it comes out of Flower's store of objects."""
    contents = {key: found.deflate() for key, found in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, contents)


class Grid:
    """Two SuperNodes, which answer what :attr:`answers` says."""

    def __init__(self) -> None:
        self.sent: dict[str, Message] = {}
        self.answers: dict[str, Message] = {}
        self.pulled: list[list[str]] = []
        self._retry_invoker = SimpleNamespace(max_time=None)
        self.refuses = False
        self.activated = "2020-01-01T00:00:00+00:00"

    def get_node_ids(self) -> Iterable[int]:
        return [11, 12]

    def get_nodes(self) -> Iterable[Any]:
        return [SimpleNamespace(node_id=node, last_activated_at=self.activated) for node in (11, 12)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        if self.refuses:
            return []
        for message in messages:
            self.sent[f"m{len(self.sent)}"] = message
        return list(self.sent)[-len(list(messages)) :]

    def pull_messages(self, tickets: Iterable[str]) -> Iterator[Message]:
        self.pulled.append(list(tickets))
        return iter([self.answers[ticket] for ticket in tickets if ticket in self.answers])

    def answer(self, ticket: str, parcel: Parcel) -> None:
        self.answers[ticket] = Message(records_of(parcel), reply_to=self.sent[ticket])


TENSORS = {
    "a/b.c é": raw(torch.randn(3, 4).to(torch.bfloat16)),
    "scalar": raw(np.float32(3)),
    "empty": raw(np.zeros((0, 5), np.int64)),
    "large": raw(np.arange(2_000_000, dtype=np.float32)),  # more than one of Flower's chunks
    "flags": raw(np.array([True, False])),
}


def test_a_parcel_of_any_dtype_travels_whole() -> None:
    parcel = Parcel(meta={"list": [1, None, "é"], "deep": {"x": 1.5}}, tensors=TENSORS)
    message = travelled(Message(records_of(parcel), 11, "train"))
    found = parcel_of(message.content)
    assert found.meta == parcel.meta
    assert {name: (t.dtype, t.shape, bytes(t.data)) for name, t in found.tensors.items()} == {
        name: (t.dtype, t.shape, bytes(t.data)) for name, t in TENSORS.items()
    }


def test_a_parcel_may_have_no_tensors() -> None:
    assert parcel_of(travelled(Message(records_of(Parcel(meta={})), 11, "train")).content).tensors == {}


def test_a_message_of_somebody_elses_is_refused() -> None:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    with pytest.raises(ValueError, match="no parcel"):
        parcel_of(RecordDict())
    with pytest.raises(ValueError, match="JSON object"):
        parcel_of(RecordDict({"shoal": ConfigRecord({"json": "[]"}), "tensors": ArrayRecord()}))
    foreign = ArrayRecord({"w": Array(np.zeros(2))})
    with pytest.raises(ValueError, match=r"numpy\.ndarray"):
        parcel_of(RecordDict({"shoal": ConfigRecord({"json": "{}"}), "tensors": foreign}))
    with pytest.raises(ValueError, match="RecursionError"):
        parcel_of(RecordDict({"shoal": ConfigRecord({"json": "[" * 100_000}), "tensors": ArrayRecord()}))
    with pytest.raises(ValueError, match="AttributeError"):
        parcel_of(RecordDict({"shoal": ConfigRecord({"json": "{}"}), "tensors": ConfigRecord({"w": 1})}))


def test_the_same_tensors_are_uploaded_once() -> None:
    grid = Grid()
    wire = FlowerWire(grid)
    assert wire.present() == ["11", "12"]
    wire.send(["11", "12"], Parcel(meta={"n": 1}, tensors=TENSORS))
    wire.send(["11"], Parcel(meta={"n": 2}, tensors=dict(TENSORS)))
    one, other, third = [message.content["tensors"] for message in grid.sent.values()]
    assert one is other
    assert one is third
    assert [message.metadata.dst_node_id for message in grid.sent.values()] == [11, 12, 11]


def test_other_tensors_under_the_same_names_are_not_taken_for_these() -> None:
    grid = Grid()
    wire = FlowerWire(grid)
    wire.send(["11"], Parcel(meta={}, tensors={"w": RawTensor("uint8", (1,), b"a")}))
    wire.send(["11"], Parcel(meta={}, tensors={"w": RawTensor("uint8", (1,), b"b")}))
    assert [parcel_of(message.content).tensors["w"].data for message in grid.sent.values()] == [b"a", b"b"]


def test_replies_come_one_at_a_time() -> None:
    grid = Grid()
    wire = FlowerWire(grid)
    tickets = wire.send(["11", "12"], Parcel(meta={}))
    for ticket in tickets.values():
        grid.answer(ticket, Parcel(meta={"of": ticket}))
    replies = wire.receive(5.0)
    ticket, answer = next(replies)
    assert isinstance(answer, Parcel)
    assert answer.meta == {"of": ticket}
    assert grid.pulled == [[ticket]], "the second reply is not to be in memory yet"
    assert [ticket for ticket, _ in replies] == [tickets["12"]]
    assert list(wire.receive(0.0)) == []


def test_it_waits_no_longer_than_told() -> None:
    wire = FlowerWire(Grid())
    wire.send(["11"], Parcel(meta={}))
    begin = time.monotonic()
    assert list(wire.receive(0.6)) == []
    assert 0.5 < time.monotonic() - begin < 3


def test_a_forgotten_ticket_is_asked_for_no_more() -> None:
    grid = Grid()
    wire = FlowerWire(grid)
    tickets = wire.send(["11", "12"], Parcel(meta={}))
    wire.forget([tickets["11"], "unknown"])
    assert list(wire.receive(0.0)) == []
    assert grid.pulled == [[tickets["12"]]]


def test_a_parcel_that_is_under_way_is_not_sent_again() -> None:
    grid = Grid()
    wire = FlowerWire(grid)
    parcel = Parcel(meta={"n": 1})
    first = wire.send(["11", "12"], parcel)
    wire.forget(list(first.values()))
    assert wire.send(["11"], parcel) == {"11": first["11"]}
    grid.answer(first["11"], Parcel(meta={"late": True}))
    [(ticket, answer)] = wire.receive(0.0)
    assert ticket == first["11"]
    assert isinstance(answer, Parcel)
    assert wire.send(["11"], parcel)["11"] != first["11"], "it was answered, and so is asked anew"
    assert wire.send(["12"], Parcel(meta={"n": 1}))["12"] != first["12"], "it is another parcel"


@pytest.mark.parametrize("activated", ["2100-01-01T00:00:00+00:00", ""])
def test_a_supernode_that_was_started_anew_is_sent_it_again(activated: str) -> None:
    grid = Grid()
    wire = FlowerWire(grid)
    parcel = Parcel(meta={"n": 1})
    first = wire.send(["11"], parcel)
    wire.forget(list(first.values()))
    grid.activated = activated
    assert wire.send(["11"], parcel) != first


def test_flowers_errors_become_exceptions_with_its_words() -> None:
    grid = Grid()
    wire = FlowerWire(grid)
    ticket = wire.send(["11"], Parcel(meta={}))["11"]
    grid.answers[ticket] = Message(Error(8, "ClientApp stopped responding."), reply_to=grid.sent[ticket])
    [(found, error)] = wire.receive(1.0)
    assert found == ticket
    assert isinstance(error, EngineError)
    assert "ClientApp stopped responding." in str(error)


def test_a_reply_that_cannot_be_read_is_that_sites_failure_alone() -> None:
    from flwr.app import ConfigRecord, RecordDict

    grid = Grid()
    wire = FlowerWire(grid)
    tickets = wire.send(["11", "12"], Parcel(meta={}))
    records = RecordDict({"shoal": ConfigRecord({"json": "{}"}), "tensors": ConfigRecord({"w": 1})})
    grid.answers[tickets["11"]] = Message(records, reply_to=grid.sent[tickets["11"]])
    grid.answer(tickets["12"], Parcel(meta={"good": True}))
    found = dict(wire.receive(1.0))
    assert isinstance(found[tickets["11"]], ValueError)
    assert isinstance(found[tickets["12"]], Parcel)


@pytest.mark.parametrize("error", [RecursionError, ValueError, KeyError, DecodeError])
def test_so_is_one_that_flower_cannot_read(error: type[Exception]) -> None:
    grid = Grid()
    wire = FlowerWire(grid)
    ticket = wire.send(["11"], Parcel(meta={}))["11"]
    grid.pull_messages = lambda tickets: _raise(error("damaged"))  # type: ignore[method-assign]
    [(found, damaged)] = wire.receive(1.0)
    assert found == ticket
    assert isinstance(damaged, ValueError)
    assert error.__name__ in str(damaged)


def test_a_message_that_flower_could_not_file_gets_a_ticket_of_which_nothing_comes() -> None:
    grid = Grid()
    wire = FlowerWire(grid)
    grid.push_messages = lambda messages: [None]  # type: ignore[method-assign, assignment, misc, return-value]
    assert wire.send(["11"], Parcel(meta={}))["11"].startswith("lost-11")
    assert list(wire.receive(0.0)) == []
    assert grid.pulled == []


def test_messages_that_are_too_large_are_an_error() -> None:
    grid = Grid()
    grid.refuses = True
    with pytest.raises(EngineError, match="did not take 1 messages"):
        FlowerWire(grid).send(["11"], Parcel(meta={}))


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("call", ["present", "send", "receive"])
def test_a_superlink_that_is_gone_is_an_error(call: str) -> None:
    import httpx

    grid = Grid()
    wire = FlowerWire(grid)
    wire.send(["11"], Parcel(meta={}))
    for name in ("get_node_ids", "push_messages", "pull_messages"):
        setattr(grid, name, lambda *args: _raise(httpx.ConnectError("refused")))
    calls = {
        "present": wire.present,
        "send": lambda: wire.send(["11"], Parcel(meta={})),
        "receive": lambda: list(wire.receive(1.0)),
    }
    with pytest.raises(EngineError, match="refused"):
        calls[call]()


def test_a_run_that_was_stopped_is_said_to_be() -> None:
    from flwr.supercore.run import RunNotRunningException

    grid = Grid()
    wire = FlowerWire(grid)
    grid.get_node_ids = lambda: _raise(RunNotRunningException())  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="ended the run"):
        wire.present()


def test_the_grid_does_not_try_for_ever() -> None:
    grid = Grid()
    FlowerWire(grid, patience=7.0)
    assert grid._retry_invoker.max_time == 7.0
